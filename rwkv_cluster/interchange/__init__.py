"""Weights in the files of other programs: what they call a tensor, how to read them, how to write them."""
