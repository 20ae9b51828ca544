"""How the tasks of a meta-batch are run: one by one, in threads, stacked, or compiled."""
