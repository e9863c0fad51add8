"""A guard against a fault of torch's CPU builds that makes the first result of a function wrong, now and then.

Where several threads call a function of MKL's vector mathematics for the first time in a process, one of them may
compute its part with the least accurate of MKL's kernels: errors of 3e-9 in float64, in one of eight processes here
(https://github.com/pytorch/pytorch/issues/188792; MKL 2024.2, which torch 2.13 has). A call that no thread shares comes
first, therefore.
"""

from __future__ import annotations

import functools

import torch

FUNCTIONS = (
    torch.exp,
    torch.expm1,
    torch.log,
    torch.log1p,
    torch.log2,
    torch.sqrt,
    torch.rsqrt,
    torch.erf,
    torch.erfc,
    torch.erfinv,
    torch.tanh,
)
"""What the torch path takes of MKL's vector mathematics."""


@functools.cache
def settle_first_calls() -> None:
    """Call each function once, in both precisions, on a number: too little work for a second thread."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in FUNCTIONS:
            function(number)
