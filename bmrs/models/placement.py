"""Noise at several places of a network at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor, nn

from bmrs.checks import shown
from bmrs.graph.stock_layers import DROPOUTS, HOMOGENEOUS_ACTIVATIONS, OTHER_ACTIVATIONS
from bmrs.graph.suggestions import suggest
from bmrs.noise.added import note_what_was_added
from bmrs.noise.hooks import own_noise, remove_noise_hook
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.placement import Structures, Where, add_noise, chosen_layers, output_structures
from bmrs.noise.wrappers import inside_wrappers
from bmrs_kernels.options import Backend, Granularity

ModelT = TypeVar("ModelT", bound=nn.Module)

_KEEP_CHANNELS = (*HOMOGENEOUS_ACTIVATIONS, *OTHER_ACTIVATIONS, *DROPOUTS)


@dataclass(frozen=True)
class NoisePlace:
    """Layers that get noise in one way.

    Attributes:
        where: the layers, as for `bmrs.add_noise`.
        structures: ``"features"``, every entry of a layer's output; ``"heads"``, the attention heads that it reads; or
            ``"hidden"``, the hidden units of a recurrent layer.
        num_heads: for ``"heads"`` their number; None reads it from the attribute ``num_heads`` of the module that the
            layer lies in.
        num_structures: structures of the layers' output, where they cannot be inferred. They can as for
            `bmrs.add_noise`, and of an activation that follows such a layer in an ``nn.Sequential``.
        dim: dimension that they lie along; given exactly when ``num_structures`` is.
    """

    where: Where
    structures: Structures = "features"
    num_heads: int | None = None
    num_structures: int | None = None
    dim: int | None = None


Placement: TypeAlias = "Sequence[NoisePlace | str] | Literal['suggest']"


def place_noise(
    model: ModelT,
    placement: Placement,
    *,
    granularity: Granularity = "element",
    backend: Backend = "auto",
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    **options: Any,
) -> ModelT:
    """Put noise at all places of a placement, in place.

    Args:
        model: any module, trained or not.
        placement: `NoisePlace` records or glob patterns on qualified names, such as those of
            ``NETWORKS["resnet50"].placements["inner"]`` or ``["block?.hidden"]``; or ``"suggest"``: every place that
            `bmrs.suggest` finds, at the last of those layers of which one is enough.
        granularity: see `bmrs.NoiseLayer`; hidden units always have ``"batch"``.
        backend: see `bmrs.NoiseLayer`.
        example_inputs: for ``"suggest"``, as for `bmrs.compact`.
        options: further options of `bmrs.add_noise`.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module, a part of the placement is neither a record nor a pattern, or an option is
            of the wrong type.
        ValueError: as `bmrs.add_noise`; the placement is empty or another word, or ``"suggest"`` has no example or
            finds no place. The model is then unchanged.
    """
    inner = inside_wrappers(model)
    calls = [call for place in _places(model, placement, example_inputs) for call in _calls(inner, place)]
    before = {module for module in model.modules() if isinstance(module, NoiseLayer)}
    try:
        for call in calls:
            drawn: Granularity = "batch" if call["structures"] == "hidden" else granularity
            add_noise(model, **call, granularity=drawn, backend=backend, **options)
    except (TypeError, ValueError):
        _remove_noise(model, keep=before)
        raise
    return model


def _places(model: nn.Module, placement: Placement, example_inputs: Any) -> list[NoisePlace]:
    if placement == "suggest":
        if example_inputs is None:
            raise ValueError('placement="suggest" needs example_inputs, to see what the model does with them')
        found = suggest(model, example_inputs)
        names = {name for place in found for name in (place.layers if place.together else place.layers[-1:])}
        if not names:
            raise ValueError(
                f'placement="suggest" finds no place in the model ({type(model).__name__}) where noise would remove '
                "something"
            )
        hidden = {name for place in found for name in place.hidden} & names
        rest = [NoisePlace(lambda name, layer: name in names - hidden)] if names - hidden else []
        return rest + ([NoisePlace(lambda name, layer: name in hidden, "hidden")] if hidden else [])
    if isinstance(placement, str) or not placement:
        raise ValueError(
            f'placement must be a sequence of patterns or NoisePlace records, or "suggest", got {shown(placement)}'
        )
    for place in placement:
        if not isinstance(place, NoisePlace | str):
            raise TypeError(f"a placement must consist of patterns or NoisePlace records, got {shown(place)}")
    return [NoisePlace(place) if isinstance(place, str) else place for place in placement]


def _calls(model: nn.Module, place: NoisePlace) -> Iterator[dict[str, Any]]:
    """Yield arguments of `add_noise` that together are a place: one call for all layers of a kind."""
    same = {"structures": place.structures, "num_structures": place.num_structures, "dim": place.dim}
    if place.structures == "heads" and place.num_heads is None:
        kinds = {
            name: {"num_heads": _heads_read_by(model, name)} for name in chosen_layers(model, place.where)
        }
    elif place.structures == "features" and place.num_structures is None:
        kinds = {
            name: _structures_of(model, name, layer)
            for name, layer in chosen_layers(model, place.where).items()
        }
    else:
        kinds = {}
    if not kinds:
        yield same | {"where": place.where, "num_heads": place.num_heads}
    while kinds:
        kind = next(iter(kinds.values()))
        names = {name for name, other in kinds.items() if other == kind}
        yield same | kind | {"where": lambda name, _, names=names: name in names}
        kinds = {name: other for name, other in kinds.items() if name not in names}


def _heads_read_by(model: nn.Module, name: str) -> int:
    attention = model.get_submodule(name.rpartition(".")[0])
    num_heads = getattr(attention, "num_heads", None)
    if not isinstance(num_heads, int):
        raise ValueError(
            f"the heads that layer {name!r} reads cannot be inferred, as {type(attention).__name__} has no attribute "
            "num_heads: give num_heads"
        )
    return num_heads


def _structures_of(model: nn.Module, name: str, layer: nn.Module) -> dict[str, int]:
    """Return the structures of an activation, from the layer in front of it; nothing for what `add_noise` infers."""
    parent, _, own = name.rpartition(".")
    container = model.get_submodule(parent)
    if not isinstance(layer, _KEEP_CHANNELS) or type(container).forward is not nn.Sequential.forward:
        return {}
    siblings = list(container._modules)
    for sibling in reversed(siblings[: siblings.index(own)]):
        in_front = container.get_submodule(sibling)
        if not isinstance(in_front, _KEEP_CHANNELS):
            num_structures, dim = output_structures(f"{parent}.{sibling}".lstrip("."), in_front)
            return {"num_structures": num_structures, "dim": dim}
    return {}


def _remove_noise(model: nn.Module, keep: set[NoiseLayer]) -> None:
    """Take away noise layers that `add_noise` put into a model."""
    for layer in list(model.modules()):
        noise = own_noise(layer)
        parts = {part for part in (() if noise is None else noise.modules()) if isinstance(part, NoiseLayer)}
        if parts and not parts & keep and remove_noise_hook(layer):
            del layer._modules["noise"]
    note_what_was_added(inside_wrappers(model))
