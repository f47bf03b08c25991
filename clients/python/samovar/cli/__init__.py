"""The command line `samovar`."""
