"""The target: text and a language model, and the pass that writes its activations into a cache."""
