"""What training adds to a network: loss, optimiser groups, batches."""
