"""The networks: torch and MONAI blocks, no data."""
