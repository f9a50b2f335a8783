"""What checkpoints hold, whether they are sound, and where two of them differ."""
