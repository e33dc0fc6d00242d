"""Doors to the bundles: the command `hi-end-mae` and `segment` in Python. What they do is in the bundles' configs."""
