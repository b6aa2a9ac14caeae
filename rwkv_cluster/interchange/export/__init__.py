"""Weights written for other programs: a format a row of `table`, and a file for what is its own."""
