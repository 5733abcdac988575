"""Training a small language model from text, so that there is a target to explain."""
