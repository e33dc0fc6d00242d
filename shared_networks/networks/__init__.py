"""The networks: pure PyTorch and MONAI blocks, no data."""
