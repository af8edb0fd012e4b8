"""The embedded reference model, its training script and its held-out data."""
