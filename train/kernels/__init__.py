"""The arithmetic of a training step; each fast path beside the plain one that specifies it."""
