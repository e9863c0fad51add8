"""The recipe of `bmrs train` against other ways to a network of the same size."""
