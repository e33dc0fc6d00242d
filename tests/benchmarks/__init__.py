"""Measurements behind the figures in the docs; run by hand, each as a module."""
