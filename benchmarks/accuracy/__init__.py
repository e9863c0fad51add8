"""How right every number is: the high-precision reference, its table, and what is measured against it."""
