"""Data sets included in jaxdiff, each with captions, renderer and scorer."""
