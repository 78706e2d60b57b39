"""Measurements: return-law accuracy, speed, base policy. Each is a command; `results/` keeps what they wrote."""
