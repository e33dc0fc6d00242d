"""Segment, score and inspect scans."""
