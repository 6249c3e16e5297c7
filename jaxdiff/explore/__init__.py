"""Embedding maps of a data set: its images as points in a trained model's space."""
