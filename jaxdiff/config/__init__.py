"""Typed dataclasses to JSON and back, and recipe files."""
