"""Collectives and layers cut over ranks, given plain integers and process groups (floor 1)."""
