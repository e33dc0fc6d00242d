"""Let other programs use what this package makes."""
