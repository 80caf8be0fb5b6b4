"""Passes that spend less where a call needs less."""
