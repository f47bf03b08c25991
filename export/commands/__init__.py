"""The commands of `python -m export`, a file each: what they take, and what they print.

They import torch only when they run, so that --help and what needs no work are quick.
"""
