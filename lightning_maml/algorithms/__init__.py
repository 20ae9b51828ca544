"""The algorithms as Lightning modules."""
