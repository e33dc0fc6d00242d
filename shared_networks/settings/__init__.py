"""Read the settings of a command line."""
