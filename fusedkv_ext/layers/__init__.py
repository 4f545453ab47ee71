"""Modules: attention, latent attention, mixture of experts, fusion weights, and the decoder."""
