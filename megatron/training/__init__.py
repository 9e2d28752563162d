"""Training: the loop and everything it calls; the highest floor below the entry points."""
