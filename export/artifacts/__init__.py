"""Artifacts: writing, reading, interpretation and verification."""
