"""What one would do instead: the recipe of `bmrs train` against other ways to a network of the same size."""
