"""Seeds of the noise where several processes train one model."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

# An odd number, so that ranks give different multiples of it in 63 bits.
_STRIDE = 0x1E3779B97F4A7C15
_BITS = 2**63 - 1


def seed_of_rank(device: torch.device) -> Tensor | None:
    """Return a seed for this process's noise; None where torch's generator alone can give it.

    Training programs seed torch alike on every rank (Lightning's ``seed_everything``, transformers' and accelerate's
    ``set_seed``), so that the generator's next number is the same on all of them.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    rank = distributed.get_rank()
    if rank == 0:
        return None
    drawn = torch.randint(0, _BITS, (), dtype=torch.int64, device=device)
    return drawn ^ (rank * _STRIDE & _BITS)
