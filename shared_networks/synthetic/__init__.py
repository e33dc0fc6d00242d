"""Make synthetic CTs with organ labels."""
