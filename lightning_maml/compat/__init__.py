"""Other libraries' names for this one's algorithms, so that a pipeline only has to change an import line."""
