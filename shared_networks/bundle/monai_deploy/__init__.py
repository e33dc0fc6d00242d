"""Run the bundles in MONAI Deploy."""
