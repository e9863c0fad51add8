"""Measurements of the project: how right it is, how fast, and what networks it prunes to."""
