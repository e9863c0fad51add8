"""Noise of models whose parameters torch's data parallelism shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn

from bmrs.noise.layer import NoiseLayer
from bmrs.noise.wrappers import data_parallel_part, is_sharded


def check_gradients_arrive(divergence: Tensor, model: nn.Module, layers: Mapping[str, NoiseLayer]) -> None:
    """Have backward of a KL term raise RuntimeError where ``fully_shard`` would lose its gradients without a word.

    Between forward and backward, parameters may be whole. What backward of the loss has cut again takes gradients on
    its shards only; those of the whole parameters, with which the KL term was computed, would go nowhere.
    """
    if torch.compiler.is_compiling() or not distributed.is_available() or not distributed.is_initialized():
        return
    if data_parallel_part(model) != "fully_shard":
        return
    cuts = {name: _cuts(layer.mu) for name, layer in layers.items()}

    def check(_: Tensor) -> None:
        for name, layer in layers.items():
            if _cuts(layer.mu) > cuts[name]:
                raise RuntimeError(
                    f"the KL gradient of noise layer {name!r} would be lost, because fully_shard has already reduced "
                    "the gradients of this step: call kl_divergence after the forward pass, and backward once, on the "
                    "sum of the loss and the KL term"
                )

    divergence.register_hook(check)


def _cuts(tensor: Tensor) -> int:
    """Return by how many dimensions of a mesh a tensor is spread."""
    return tensor.device_mesh.ndim if is_sharded(tensor) else 0  # type: ignore[attr-defined]
