"""The mathematics of one task: derivatives, the inner loop and the backward pass. Torch only."""
