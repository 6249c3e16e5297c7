"""Guidance: turns networks into a denoiser that follows a prompt."""
