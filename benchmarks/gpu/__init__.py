"""What needs a GPU: tests, sanitizers, profiles and times of the compiled kernels."""
