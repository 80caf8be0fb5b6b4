"""Adapters: small trained parts beside the layers of a larger network."""
