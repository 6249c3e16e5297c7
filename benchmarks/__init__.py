"""Comparisons with PyTorch and diffusers on the same machine; not part of the package.

Run them from the root of a clone, with the extra `parity`.
"""
