"""Ahead-of-time compilation of every kernel as it is launched, and what its machine code says."""
