"""Ranks of one run: collectives, heartbeats, detection of ranks that died or hang."""
