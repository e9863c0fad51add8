"""Seeds where a forward pass is computed a second time during backward, which must meet the noise of the first."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_DRAWN_AGAIN = (
    "activation checkpointing with preserve_rng_state=False draws other noise in backward than in forward: leave "
    "preserve_rng_state at True, or give multiply_noise a seed"
)

torch.library.define("bmrs_kernels::keep_seed", "(Tensor seed) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("bmrs_kernels::keep_seed", "CompositeExplicitAutograd")
def _copy(seed: Tensor) -> Tensor:
    return seed.clone()


@torch.library.register_fake("bmrs_kernels::keep_seed")
def _(seed: Tensor) -> Tensor:
    return torch.empty_like(seed)


@torch.library.register_vmap("bmrs_kernels::keep_seed")
def _(info: Any, in_dims: tuple[int | None], seed: Tensor) -> tuple[Tensor, int | None]:
    return kept_seed(seed), in_dims[0]


@torch.library.impl("bmrs_kernels::keep_seed", "Autograd")
def _mark(seed: Tensor) -> Tensor:
    """Mark the copy as what torch.compile has to save, while it traces."""
    # Imported where they are used: they are large, and loaded by torch.compile.
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.utils.checkpoint import CheckpointPolicy

    with torch._C._AutoDispatchBelowAutograd():
        kept: Tensor = torch.ops.bmrs_kernels.keep_seed(seed)
    mode = get_proxy_mode()
    if mode is not None:
        if torch._functorch.config.activation_memory_budget == 0:
            raise ValueError(
                "torch._functorch.config.activation_memory_budget must be above 0 for noise, got 0: torch.compile "
                "would draw other noise in backward than in forward; 1e-9 saves little but the seeds"
            )
        next(iter(reversed(mode.tracer.graph.nodes))).meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return kept


def kept_seed(seed: Tensor) -> Tensor:
    """Return a copy of a seed that graphs of torch.compile save for backward, whatever else they compute again there.

    Raises:
        ValueError: a graph is traced that may save nothing.
    """
    kept: Tensor = torch.ops.bmrs_kernels.keep_seed(seed)
    return kept


def check_drawing() -> None:
    """Call where a seed is drawn.

    Raises:
        RuntimeError: reentrant activation checkpointing computes again, from another state of torch's generator.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass is going on
        return
    from torch.utils.checkpoint import CheckpointFunction

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (
            frame.f_code is CheckpointFunction.backward.__code__
            and not frame.f_locals["ctx"].preserve_rng_state
        ):
            raise RuntimeError(_DRAWN_AGAIN)
        frame = frame.f_back


def check_saved_seed(saved: Tensor, drawn: Tensor) -> None:
    """Compare the seed that autograd hands to backward with the one of forward.

    Raises:
        RuntimeError: they differ, since activation checkpointing has computed what autograd saves a second time.
    """
    if saved is drawn or (saved.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if not torch.equal(saved, drawn):
        raise RuntimeError(_DRAWN_AGAIN)
