"""Update rules: one table, and one file per idea."""
