"""Quantities by name, and a few of their judged points."""

from __future__ import annotations

import numpy as np

from benchmarks.accuracy import table
from benchmarks.accuracy.quantities import QUANTITIES

BY_NAME = {quantity.name: quantity for quantity in QUANTITIES}
KL, SNR = BY_NAME["kl_divergence"], BY_NAME["noise_snr"]
DELTA_F = BY_NAME["delta_f_lognormal"]


def few(quantity, count=200):
    """Return some judged points of a quantity."""
    judged = table.judged(quantity)
    chosen = np.random.default_rng(0).permutation(len(judged.points)) < count
    return judged.where(chosen)
