"""Data of a training run: text files, tokenizers, token files."""
