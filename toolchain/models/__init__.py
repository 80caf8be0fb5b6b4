"""Reference models of published methods; one file a model."""
