"""Ahead-of-time plans of memory and time on TPU slices and GPUs."""
