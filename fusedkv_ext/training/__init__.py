"""Training: text to tokens, the configuration, the trainer and its checkpoints."""
