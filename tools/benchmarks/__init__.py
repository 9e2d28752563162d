"""What tools/benchmark.py measures: one file per measurement, and what they share."""
