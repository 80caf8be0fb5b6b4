"""Voice models."""
