"""Dictionaries in the forms of other tools: ours written so that their own classes load them, theirs read into runs.

Everything passes through one canonical form (canonical.py), in float64 and on raw activations; folds.py brings a
foreign convention to it, a module per tool knows that tool's files, formats.py knows the modules. export.py and
importing.py are the two stages, which `thresher export` and `thresher import` call. No foreign package is imported.
"""
