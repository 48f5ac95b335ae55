"""The race: our modes and what else could run the same weights, on one clock."""
