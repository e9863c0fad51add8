"""Functions of DTensors, which several processes share: each process computes its own shard.

Not by ``register_sharding``: there DTensor may choose one layout for forward and another for backward, and the noise of
a shard depends on how it was cut.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs

PLAIN_TYPES = (Tensor, torch.nn.Parameter, type(None))

# Odd, so that shards give different multiples of it in 63 bits.
_STRIDE = 0x2545F4914F6CDD1D
_BITS = 2**63 - 1


def is_sharded(tensor: object) -> TypeIs[DTensor]:
    """Return whether a tensor is a DTensor."""
    if type(tensor) in PLAIN_TYPES:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # what nobody has imported, nobody uses
    return module is not None and isinstance(tensor, module.DTensor)


def on_shards_elementwise(function: Callable[..., Tensor], **named: Tensor) -> Tensor:
    """Return an elementwise function of tensors in their order, laid out as the first one is.

    Tensors of several shapes, which broadcast, are gathered first.

    Raises:
        TypeError: some of the tensors are DTensors and others are not.
    """
    _check_all_sharded(dict(named))
    tensors = tuple(named.values())
    first = cast("DTensor", tensors[0])
    placements = [_replicated_if_partial(placement) for placement in first.placements]
    if any(tensor.shape != first.shape for tensor in tensors):
        placements = [_replicate() for _ in placements]
    local = [_local(cast("DTensor", tensor), first, placements, placements) for tensor in tensors]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return _global(function(*local), first, placements, shape)


def on_shards_of_activations(
    function: Callable[..., Tensor],
    x: Tensor,
    structures: Sequence[Tensor | None],
    seed: Tensor,
    *,
    names: Sequence[str],
    dim: int,
    drawn: set[int],
    linear: bool,
) -> Tensor:
    """Return a function of activations and tensors of structures, laid out as the activations are.

    Args:
        function: of the shards of x, of each of the structures' tensors and of the seed.
        x: activations.
        structures: tensors of shape (structures,), or None.
        seed: int64 scalar, the same in all processes of the mesh.
        names: what to call the structures' tensors in an error.
        dim: axis of x along which the structures lie.
        drawn: axes of x along which the noise varies; shards of them get seeds of their own, the first that of all.
        linear: whether the function is linear in x, so that parts of a sum can be multiplied each.

    Raises:
        TypeError: some of the tensors are DTensors and others are not.
        ValueError: they lie on different meshes.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    _check_all_sharded({"x": x, **dict(zip(names, structures, strict=True))})
    x = cast("DTensor", x)
    placements: list[Placement] = []
    of_structures: list[Placement] = []
    gradients: list[Placement] = []
    for placement in x.placements:
        if type(placement) is Shard:
            axis = placement.dim % x.dim()
            placements.append(Shard(axis))
            of_structures.append(Shard(0) if axis == dim else Replicate())
            gradients.append(Shard(0) if axis == dim else Partial())
        elif linear and type(placement) is Partial and placement.reduce_op == "sum":
            placements.append(placement)
            of_structures.append(Replicate())
            gradients.append(Partial())
        else:
            placements.append(Replicate())
            of_structures.append(Replicate())
            gradients.append(Replicate())
    # The gradient of a part of a sum is that of the sum.
    of_x = [_replicated_if_partial(placement) for placement in placements]
    local_x = _local(x, x, placements, of_x)
    local = [
        None if tensor is None else _local(cast("DTensor", tensor), x, of_structures, gradients)
        for tensor in structures
    ]
    shard = _index_of_shard(x, placements, drawn)
    # Not 0 with a stride: the first shard draws what a single process would.
    local_seed = seed ^ (shard * _STRIDE & _BITS) if shard else seed
    return _global(function(local_x, *local, local_seed), x, placements, x.shape)


def _check_all_sharded(tensors: dict[str, Tensor | None]) -> None:
    sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    plain = [name for name, tensor in tensors.items() if tensor is not None and name not in sharded]
    if plain:
        raise TypeError(
            f"{plain[0]} must be a DTensor as {next(iter(sharded))} is one, got a plain tensor: distribute it with "
            "torch.distributed.tensor.distribute_tensor, or a whole module with distribute_module"
        )
    meshes = {name: tensor.device_mesh for name, tensor in sharded.items()}
    first = next(iter(meshes))
    for name, mesh in meshes.items():
        if mesh != meshes[first]:
            raise ValueError(f"{name} must lie on the mesh of {first}, {meshes[first]}, got {mesh}")


def _replicate() -> Placement:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _replicated_if_partial(placement: Placement) -> Placement:
    return _replicate() if placement.is_partial() else placement


def _local(
    tensor: DTensor, like: DTensor, placements: Sequence[Placement], gradients: Sequence[Placement]
) -> Tensor:
    """Return a tensor's shard in a layout; gradients come back in another one."""
    return tensor.redistribute(like.device_mesh, placements).to_local(grad_placements=gradients)


def _global(local: Tensor, like: DTensor, placements: Sequence[Placement], shape: torch.Size) -> Tensor:
    from torch.distributed.tensor import DTensor

    result: Tensor = DTensor.from_local(
        local,
        like.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=like.stride() if like.shape == shape else torch.empty(shape, device="meta").stride(),
    )
    return result


def _index_of_shard(x: DTensor, placements: Sequence[Any], drawn: set[int]) -> int:
    """Return the number of this process's shard among those that have noise of their own."""
    coordinate = x.device_mesh.get_coordinate()
    index = 0
    for axis, placement in enumerate(placements):
        if placement.is_shard() and placement.dim in drawn:
            position = 0 if coordinate is None else coordinate[axis]
            index = index * x.device_mesh.size(axis) + position
    return index
