"""The mathematics of one task: derivatives, the inner loop and the way back. Torch only."""
