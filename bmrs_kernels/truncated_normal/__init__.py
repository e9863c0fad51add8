"""The mathematics of the truncated normal distribution of log θ, in torch, Triton and numba."""
