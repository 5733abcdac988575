"""Loops over rows that PyTorch and NumPy would take many passes for, compiled by Numba, each beside its plain form."""
