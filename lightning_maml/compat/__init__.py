"""Other libraries' names over this one's algorithms, so that a pipeline changes an import line."""
