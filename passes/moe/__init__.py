"""Passes that run some parts of a network for some of its inputs."""
