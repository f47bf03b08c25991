"""Training loop, checkpoints and signals."""
