"""Experiments: methods compared under one budget, probes, evaluation."""
