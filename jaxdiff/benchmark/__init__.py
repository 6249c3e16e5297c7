"""Measured speed and memory of training, sampling, data loading and checkpoints."""
