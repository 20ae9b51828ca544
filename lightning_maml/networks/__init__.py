"""Networks as functions of their parameters, and the library's own networks."""
