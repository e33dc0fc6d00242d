"""From a network's output to files a user opens."""
