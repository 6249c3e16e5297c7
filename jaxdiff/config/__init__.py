"""Configuration files: where recipes are, and which one a name means."""
