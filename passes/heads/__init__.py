"""Passes that look at attention heads one by one: which ones steer a sampler, which ones a model can do without."""
