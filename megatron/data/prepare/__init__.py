"""What makes, tokenises, merges and audits data (floor 1)."""
