"""Train: loss, optimiser, handlers, and resuming."""
