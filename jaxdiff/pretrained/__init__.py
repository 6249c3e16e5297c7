"""Formats of other libraries, and this package's own: reading and writing trained models.

`key_mapping` has the mechanism; beside it is one small table for each network.
"""
