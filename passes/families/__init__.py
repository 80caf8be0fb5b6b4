"""How each model family answers for its layers; one file a family."""
