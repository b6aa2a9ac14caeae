"""Checkpoints: what is in one, writing, verifying, choosing and resuming. Start at checkpointer.py and resume.py."""
