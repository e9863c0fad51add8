"""Where kernels can be tested: interpreted on CPU tensors, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from bmrs_kernels.dispatch import backend

ON_GPU = torch.cuda.is_available() and not backend.INTERPRETING
DEVICE = "cuda" if ON_GPU else "cpu"
RUNS_KERNELS = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not backend.TRITON_IS_INSTALLED or not (backend.INTERPRETING or ON_GPU),
        reason="needs Triton and a GPU or TRITON_INTERPRET=1",
    ),
]
