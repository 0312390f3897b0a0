"""Data: streams and tables with exact resume, transforms, corpus preparation, the embedded emoji corpus."""
