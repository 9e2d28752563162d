"""Update rules: one table, one file an idea."""
