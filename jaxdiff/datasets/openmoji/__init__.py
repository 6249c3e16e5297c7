"""OpenMoji drawings of people at work."""
