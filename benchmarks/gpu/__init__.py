"""What only a GPU can tell: tests, sanitizers, profiles and times there."""
