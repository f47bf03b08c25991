"""Datasets: the built-in ones and user folders, with fixed splits."""
