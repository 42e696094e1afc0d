"""Mistakes of which every one has to make a test fail."""
