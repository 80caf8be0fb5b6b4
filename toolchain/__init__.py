"""The way in and the whole run."""

__version__ = "0.1.0"
