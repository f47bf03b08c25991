"""Distributions, estimators and batch-invariant operators that model families share."""
