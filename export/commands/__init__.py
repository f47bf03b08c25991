"""The commands of `python -m export`, one per file: their options and their output.

Commands import torch only when they run, so that --help and checks that need no model are fast.
"""
