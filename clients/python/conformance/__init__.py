"""Conformance suite for servers: one module per kind of check, and the table of results."""
