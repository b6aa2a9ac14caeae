"""Checks of one machine: each module looks at one thing and returns its rows."""
