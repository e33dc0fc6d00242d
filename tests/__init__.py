"""Tests run side by side, and so do the processes that they start: threads that wait for a core take its time.

It is set here as libraries read it once, when they are imported, which `conftest.py` does.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
