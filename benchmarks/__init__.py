"""Benchmarks with real servers and the real client, on artifacts with random weights."""
