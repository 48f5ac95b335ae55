"""What `twotower bench` measures: our modes and other engines on the same weights, on one clock."""
