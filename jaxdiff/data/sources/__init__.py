"""Data sources: where captioned images are read from."""
