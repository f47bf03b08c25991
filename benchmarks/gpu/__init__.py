"""GPU check: parts with time limits that prove and measure the server on a GPU, the most valuable first."""
