"""The commands: what each does with its words, and how stages are wired together."""
