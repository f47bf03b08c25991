"""Samovar's server: runs the programs of artifacts, batched, over gRPC. Knows no model family."""

__version__ = "0.1.0"
