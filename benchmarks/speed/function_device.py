"""Where the function benchmarks run."""

from __future__ import annotations

import pytest
import torch


def device_of(config: pytest.Config) -> torch.device:
    """Return where the functions run."""
    name = config.getoption("benchmark_device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
