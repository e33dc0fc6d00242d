"""Measure label maps against the truth, and report it."""
