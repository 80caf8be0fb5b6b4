"""Parts that two models or more share."""
