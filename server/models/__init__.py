"""Artifacts on disk: read, validated, replayed and registered."""
