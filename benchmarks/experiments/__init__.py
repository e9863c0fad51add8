"""Networks trained, pruned and compacted: the paper's experiment, rivals at equal size, common architectures."""
