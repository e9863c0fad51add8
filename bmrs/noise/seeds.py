"""Seeds of the noise: from torch's generator or a layer's own, and different where processes train one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from bmrs.noise.wrappers import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# An odd number, so that ranks give different multiples of it in 63 bits.
_STRIDE = 0x1E3779B97F4A7C15
_BITS = 2**63 - 1


def seed_of(x: Tensor, *, generator: torch.Generator | None, same_on_all_ranks: bool) -> Tensor | None:
    """Return a seed for this process's noise on x; None where torch's generator alone can give it.

    Training programs seed torch alike on every rank (Lightning's ``seed_everything``, transformers' and accelerate's
    ``set_seed``), so that the generator's next number is the same on all of them. Processes that share x as a DTensor
    get one seed, that of the first of them.

    Raises:
        RuntimeError: activation checkpointing computes the forward pass again, and would get another draw.
    """
    rank = 0 if same_on_all_ranks else _rank(x)
    if generator is None and rank == 0:
        return None
    if (
        generator is not None
        and not torch.compiler.is_compiling()
        and torch._C._current_graph_task_id() != -1
    ):
        raise RuntimeError(
            "noise with a generator of its own cannot be drawn again in backward, as activation checkpointing does, "
            "which restores torch's generator alone: leave generator out for layers inside a checkpoint"
        )
    device = x.device if generator is None else generator.device
    drawn = torch.randint(0, _BITS, (), dtype=torch.int64, device=device, generator=generator).to(x.device)
    return drawn ^ (rank * _STRIDE & _BITS) if rank else drawn


def _rank(x: Tensor) -> int:
    if not distributed.is_available() or not distributed.is_initialized():
        return 0
    # The mesh of a DTensor are the processes of one copy of the model.
    return _first_of(x.device_mesh) if is_sharded(x) else distributed.get_rank()  # type: ignore[attr-defined]


def _first_of(mesh: DeviceMesh) -> int:
    return int(mesh.mesh.min())


# torch.compile cannot follow it. What `torch.compiler.assume_constant_result` does, which would load the compiler.
_first_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
