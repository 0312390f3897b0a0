"""Pretraining: masking and one Task a file."""
