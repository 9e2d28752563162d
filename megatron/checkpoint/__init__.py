"""Checkpoints that no layout owns: pieces of parameters, committed at once, read back by name."""
