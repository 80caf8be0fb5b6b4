"""Passes that give back what other passes took: they train, and change weights but never structure."""
