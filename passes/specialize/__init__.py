"""Passes that make a model exactly as general as its use."""
