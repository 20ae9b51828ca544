"""Files that are written and read: checkpoints, archives, and steps kept to repeat a failure."""
