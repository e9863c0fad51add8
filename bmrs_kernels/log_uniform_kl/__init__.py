"""KL divergence from the truncated log-normal posterior to the log-uniform prior."""
