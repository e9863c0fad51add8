"""Which implementation serves a call: backends, checks of arguments, operators, and how kernels and loops start."""
