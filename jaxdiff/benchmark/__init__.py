"""Measured speed and memory, and the arithmetic that utilisation is measured against."""
