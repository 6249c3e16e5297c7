"""Typed dataclasses to JSON and back, and recipes from files."""
