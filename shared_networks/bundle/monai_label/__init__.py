"""Serve the bundles by MONAI Label."""
