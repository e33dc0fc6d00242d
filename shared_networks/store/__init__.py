"""Preprocess scans once into a store from which random crops are read fast."""
