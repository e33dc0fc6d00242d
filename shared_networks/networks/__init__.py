"""Define the networks, and load their weights."""
