"""Other people's formats to ours and back.

`names` holds the mechanism; beside it is one small table for each network.
"""
