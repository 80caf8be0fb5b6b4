"""Engines; one file a kind."""
