"""Collectives and layers sharded over ranks, given plain integers and process groups (floor 1)."""
