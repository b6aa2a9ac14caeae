"""Conditions that end or turn back a run: loss spikes, early stopping, signals and STOP files."""
