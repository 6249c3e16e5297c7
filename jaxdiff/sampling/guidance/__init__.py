"""Guidance: make a denoiser follow a prompt."""
