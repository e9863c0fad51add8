"""Noise of models whose layers are spread over several processes by torch's tensor parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from bmrs.noise.layer import NoiseLayer
from bmrs.noise.wrappers import data_parallel_part, is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def mesh_of(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    *,
    plain_is_right: bool,
    generator: torch.Generator | None,
) -> DeviceMesh | None:
    """Return the processes that a layer is spread over, or None for a layer of one process.

    Args:
        model: the model.
        name: the layer's qualified name.
        layer: one of its layers.
        plain_is_right: whether a layer may have no part in the tensor parallelism of the others.
        generator: what its noise is to be drawn from; torch's own if None.

    Raises:
        ValueError: the layer has no part in it, or the processes have seeded the generator differently.
    """
    for parameter in layer.parameters(recurse=False):
        if is_sharded(parameter):
            mesh: DeviceMesh = parameter.device_mesh  # type: ignore[attr-defined]
            _check_seeds(mesh, generator)
            return mesh
    if not plain_is_right and any(map(is_sharded, model.parameters())):
        raise ValueError(_no_part(name))
    return None


def replicate(noise: NoiseLayer, mesh: DeviceMesh) -> None:
    """Make the tensors of a new noise layer ones that the processes of a mesh share, each with a copy."""
    from torch.distributed.tensor import distribute_module

    distribute_module(noise, mesh)


def check_no_noise_is_left_out(model: nn.Module, layers: dict[str, NoiseLayer]) -> None:
    """Raise ValueError where noise of a model in tensor parallelism would differ between copies of one activation."""
    if torch.compiler.is_compiling() or not distributed.is_available() or not distributed.is_initialized():
        return
    plain = [
        name for name, layer in layers.items() if not layer.same_on_all_ranks and not is_sharded(layer.mu)
    ]
    # Data parallelism on shards has DTensors too, but no copies of an activation.
    if plain and any(map(is_sharded, model.parameters())) and data_parallel_part(model) is None:
        raise ValueError(_no_part(plain[0]))
    meshes = {parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter)}  # type: ignore[attr-defined]
    if len(meshes) == 1:
        return
    for name, layer in layers.items():
        if layer.same_on_all_ranks or not is_sharded(layer.mu):
            continue
        # Cut by data parallelism alone, where others are cut by tensor parallelism as well.
        is_cut = any(placement.is_shard() for placement in layer.mu.placements)  # type: ignore[attr-defined]
        own = _ranks(layer.mu.device_mesh)  # type: ignore[attr-defined]
        if is_cut and any(own < _ranks(mesh) for mesh in meshes):
            raise ValueError(_no_part(name))


def _ranks(mesh: DeviceMesh) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _no_part(name: str) -> str:
    return (
        f"other layers of the model are in tensor parallelism, but {name!r} is not, so that each process would "
        "multiply its copy of the activations by noise of its own: call add_noise after parallelize_module with a plan "
        "that has this layer, or with same_on_all_ranks=True"
    )


def _check_seeds(mesh: DeviceMesh, generator: torch.Generator | None) -> None:
    """Raise unless the processes have seeded alike what noise is drawn from; all of them call it."""
    seed = torch.initial_seed() if generator is None else generator.initial_seed()
    what, remedy = ("torch", "torch.manual_seed") if generator is None else ("generator", "its manual_seed")
    for axis in range(mesh.ndim):
        seeds: list[int] = [0] * mesh.size(axis)
        distributed.all_gather_object(seeds, seed, group=mesh.get_group(axis))
        if len(set(seeds)) > 1:
            raise ValueError(
                f"the processes of one model must have seeded {what} alike in tensor parallelism, as they hold copies "
                f"of one noise; {what}.initial_seed() is {seeds}: call {remedy} with one seed in all of them"
            )
