"""Draw scans in the patient's geometry, and scores."""
