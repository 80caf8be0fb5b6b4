"""Steps that change a model; one file a pass."""
