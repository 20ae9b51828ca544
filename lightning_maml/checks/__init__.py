"""Checks of what users bring: networks, losses, labels, and whether tasks can be stacked."""
