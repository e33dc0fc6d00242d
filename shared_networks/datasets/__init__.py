"""Find, read, pair, split and check the scans and labels of a data set."""
