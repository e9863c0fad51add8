"""Moments of the noise variable θ under the truncated log-normal posterior."""
