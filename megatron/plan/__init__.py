"""A run before it starts: memory and the dry run's report (floor 0: standard library only)."""
