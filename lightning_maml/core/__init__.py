"""The mathematics of one task: parameters, derivatives, the inner loop and the way back through it. Torch only."""
