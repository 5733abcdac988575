"""The verdict: reconstructions patched back into the target, metrics, tables and the report."""
