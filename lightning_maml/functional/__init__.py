"""The algorithms as functions of parameters and a meta-batch, without Lightning."""
