"""Inputs to token files: tokenize, shuffle, split, publish. Start at prepare.py."""
