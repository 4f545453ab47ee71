"""Checkpoints on disk: safetensors folders, distributed checkpoints, checksums."""
