"""Doors to the package: the command `hi-end-mae`, `segment` in Python, and trainers for nnU-Net."""
