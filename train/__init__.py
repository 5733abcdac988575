"""The dictionaries: what they compute, how they are trained from a cache, how they are saved."""
