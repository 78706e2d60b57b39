"""Data: OGBench's names, files and where they come from, collection, transitions, descriptions."""
