"""What operations.py exercises, a module for each kind of thing, and the table in which it is told."""
