"""How long functions, training steps, pruning and inference take, beside the plain formulas."""
