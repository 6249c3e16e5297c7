"""Generating images from the command line: options, prompt files, manifests, image metadata."""
