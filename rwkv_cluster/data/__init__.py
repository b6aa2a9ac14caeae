"""Data: from files and arrays to a token file, and from a step to the samples in it. See the modules' docstrings."""
