"""Measurements of trained agents, of the machine, and of laws that are known. Each is a command with `--out`."""
