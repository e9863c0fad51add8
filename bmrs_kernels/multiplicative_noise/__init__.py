"""Truncated log-normal noise: samples at given uniforms, and noise multiplied onto an activation."""
