"""Training data: text files, tokenizers, token files."""
