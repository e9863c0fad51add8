"""Change in log evidence when a structure's prior is reduced (Bayesian model reduction)."""
