"""Rendered scenes of fruit and vegetables."""
