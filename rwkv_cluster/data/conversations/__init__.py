"""Rows of JSONL that say what is trained on: conversations and tokens with labels."""
