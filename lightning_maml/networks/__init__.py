"""Networks as functions of their parameters, the library's own networks, and the checks of what users bring."""
