"""Passes that take parts out."""
