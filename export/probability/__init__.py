"""Distributions, estimators and batch-invariant operators that families share."""
