"""Files that are written and read: checkpoints, archives, and batches kept to reproduce a failure."""
