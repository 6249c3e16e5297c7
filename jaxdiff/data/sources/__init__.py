"""Sources of captioned images."""
