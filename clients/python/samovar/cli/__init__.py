"""The command `samovar`."""
