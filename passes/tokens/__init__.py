"""Passes that shorten the sequence of tokens."""
