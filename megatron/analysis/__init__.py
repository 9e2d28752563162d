"""What reads a run's folder: plots, reports, explained steps (floor 4)."""
