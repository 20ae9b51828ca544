"""What networks are given and return: meta-batches of episodes, trees of tensors, outputs, losses."""
