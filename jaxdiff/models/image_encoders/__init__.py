"""Image encoders whose features metrics compare."""
