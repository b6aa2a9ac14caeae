"""Adapters: what is trained beside the frozen matrices of a model; a kind a row, and a file with its formulas."""
