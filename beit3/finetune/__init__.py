"""Finetuning and probing: one Task a file, what they share in `common`."""
