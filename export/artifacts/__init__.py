"""Artifacts: written, read, interpreted and verified."""
