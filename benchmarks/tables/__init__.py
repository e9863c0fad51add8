"""Committed results, and the tables and pictures that are made from them."""
