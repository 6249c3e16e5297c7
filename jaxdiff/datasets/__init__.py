"""Data sets that come with jaxdiff, each with its captions, renderer and scorer."""
