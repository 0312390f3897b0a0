"""Tokenizers: text by SentencePiece; images by VQ-KD, with its quantizer and teachers."""
