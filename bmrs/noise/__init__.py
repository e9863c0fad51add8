"""Noise on the structures of a network: the layer, where it is put, and its KL divergence."""
