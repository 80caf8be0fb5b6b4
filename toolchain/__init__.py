"""The way in and the whole run."""
