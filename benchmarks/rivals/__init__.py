"""The alternatives that the project is measured against: plain formulas, and Torch-Pruning."""
