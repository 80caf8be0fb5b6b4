"""Passes that change what the rows of a call read of one another."""
