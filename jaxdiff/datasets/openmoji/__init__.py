"""OpenMoji emoji with captions; people at work are scored."""
