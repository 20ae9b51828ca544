"""What networks take and return: meta-batches of episodes, trees of tensors, outputs, losses."""
