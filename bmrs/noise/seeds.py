"""Seeds of the noise where several processes train one model."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from bmrs.noise.wrappers import is_sharded

# An odd number, so that ranks give different multiples of it in 63 bits.
_STRIDE = 0x1E3779B97F4A7C15
_BITS = 2**63 - 1


def seed_of_rank(x: Tensor) -> Tensor | None:
    """Return a seed for this process's noise; None where torch's generator alone can give it.

    Training programs seed torch alike on every rank (Lightning's ``seed_everything``, transformers' and accelerate's
    ``set_seed``), so that the generator's next number is the same on all of them. Processes that share x as a DTensor
    get one seed, that of the first of them.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    # The mesh of a DTensor are the processes of one copy of the model.
    rank = int(x.device_mesh.mesh.min()) if is_sharded(x) else distributed.get_rank()  # type: ignore[attr-defined]
    if rank == 0:
        return None
    drawn = torch.randint(0, _BITS, (), dtype=torch.int64, device=x.device)
    return drawn ^ (rank * _STRIDE & _BITS)
