"""The version of the package and of the three bundles."""

__version__ = "0.1.0"
