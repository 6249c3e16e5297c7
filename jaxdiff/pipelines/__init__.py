"""The pipeline from prompts to images, and what is done with one."""
