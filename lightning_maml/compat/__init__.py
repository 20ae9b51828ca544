"""Other libraries' names for our algorithms, so that a pipeline only has to change its imports."""
