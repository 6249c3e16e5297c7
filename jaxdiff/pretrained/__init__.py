"""Read and write trained models, in this package's format and those of other libraries.

`key_mapping` renames parameters by one table per network.
"""
