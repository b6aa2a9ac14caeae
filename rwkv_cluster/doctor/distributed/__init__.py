"""Checks that need all ranks of a job: who is there, whether they are alike, clocks, shared folder, network."""
