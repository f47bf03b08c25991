"""Built-in data sets and user data."""
