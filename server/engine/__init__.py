"""The engine loop and its scheduling policy."""
