"""Trainings whose results are tables: the paper's, rivals at equal size, compaction of architectures."""
