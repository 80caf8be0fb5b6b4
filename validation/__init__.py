"""Compare, time and gate."""
