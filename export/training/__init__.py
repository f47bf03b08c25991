"""Training loop, checkpoints and signal handling."""
