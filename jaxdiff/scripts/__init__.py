"""What `sample.py` does: prompts in, from the command line or from a file; image files out."""
