"""Benchmarks of the kernels against plain formulas and against a copy of the same bytes."""
