"""Frozen matrices in fewer bits: a kind a row, and a file with its formulas."""
