"""The pipeline from prompts to images, and functions that use it."""
