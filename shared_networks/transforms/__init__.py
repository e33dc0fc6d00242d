"""Resample and scale scans."""
