"""What the published experiments typed, and what the same lines do here."""
