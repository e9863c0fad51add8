"""What training programs put around a model: torch.compile, data parallelism, sharding."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from bmrs.checks import check_module


def inside_wrappers(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`, DistributedDataParallel and DataParallel, by whose names it goes.

    Raises:
        TypeError: it is not a module.
    """
    check_module(model)
    while True:
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def data_parallel_part(model: nn.Module) -> str | None:
    """Return the name of the wrapper that synchronises a model's parameters, or a part's; None without one."""
    # What nobody has imported, nobody uses.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return "DistributedDataParallel"
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            return "fully_shard"
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            return "FullyShardedDataParallel"
    return None


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, which several processes share."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_in_another_form(tensor: Tensor) -> bool:
    """Return whether a tensor's class computes in a way of its own with what it holds, as those of quantisation do."""
    if tensor.is_quantized:
        return True
    own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not (is_sharded(tensor) or isinstance(tensor, FakeTensor) or tensor.is_nested)


def has_no_values(tensor: Tensor) -> bool:
    """Return whether a tensor is on the meta device, or one of torch's FakeTensorMode, or made so by that."""
    return tensor.is_meta or isinstance(tensor, FakeTensor) or active_fake_mode() is not None


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor's values, those of a DTensor gathered in every process; gradients flow back to the shards."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def laid_out_like(values: Tensor, like: Tensor) -> Tensor:
    """Return values, the same in every process, on the device of a tensor, and as shards if that is a DTensor."""
    values = values.to(like.device)
    if not is_sharded(like) or is_sharded(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    # Without communication, as all processes have the values.
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
