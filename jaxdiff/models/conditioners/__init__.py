"""Conditioners of the model families."""
