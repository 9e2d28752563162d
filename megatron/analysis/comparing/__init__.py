"""Runs side by side, from their folders alone: figures from raw sums, settings that differ."""
