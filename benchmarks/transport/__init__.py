"""How fast and how good the transport solvers are."""
