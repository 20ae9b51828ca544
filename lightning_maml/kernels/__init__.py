"""Layers that compute several tasks at once, and their hand-written derivatives."""
