"""Everything that a pruning decision reads about a structure, in one pass."""
