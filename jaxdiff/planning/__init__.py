"""Ahead-of-time plans for slices of TPUs and GPUs."""
