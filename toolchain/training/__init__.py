"""Scripts that trained the weights we ship; never run in CI."""
