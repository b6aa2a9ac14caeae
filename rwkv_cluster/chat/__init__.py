"""Conversations with a trained model in a terminal."""
