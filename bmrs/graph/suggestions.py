"""Where noise would remove something from a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.graph.analysis import Analysis, analyse
from bmrs.graph.capture import Captured, capture, mark, refuse_torchscript
from bmrs.graph.channels import STAYS, varying_axes, without_repetition
from bmrs.graph.copies import evaluation_copy
from bmrs.graph.inputs import as_inputs
from bmrs.graph.layer_norms import check_approximate
from bmrs.graph.operators import GATES, LINEAR
from bmrs.graph.ties import needed_layers, same_channels, sufficient_layers
from bmrs.noise.lookup import noise_layers
from bmrs.noise.placement import add_noise, can_get_noise
from bmrs.text_table import table_lines


@dataclass(frozen=True)
class Suggestion:
    """A place for noise.

    Attributes:
        layers: qualified names of the layers to put noise behind. One is enough, unless ``together``.
        hidden: those of them that are recurrent, whose hidden units are the structures: ``structures="hidden"`` and
            ``granularity="batch"`` of `bmrs.add_noise`.
        together: whether all of them need it: what they make is added, and a channel of the sum leaves only if it is
            pruned in every part.
        structures: structures of each of the layers, of all its layers and directions if it is recurrent.
        parameters: values of parameters that the network loses with one structure, on average.
        flops: floating-point operations that it loses, two for each multiply-add, for the whole example.
    """

    layers: tuple[str, ...]
    together: bool
    structures: int
    parameters: float
    flops: float
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suggestions:
    """Places for noise, the one that can save most parameters first; ``str()`` gives a table."""

    places: tuple[Suggestion, ...]

    def __iter__(self) -> Any:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, ready for JSON."""
        return {"places": [asdict(place) for place in self.places]}

    def __str__(self) -> str:
        header = ("structures", "parameters each", "FLOPs each", "noise behind")
        rows = [
            (
                f"{place.structures:,}",
                f"{place.parameters:,.0f}",
                f"{place.flops:,.0f}",
                (" and " if place.together else " or ").join(
                    f"{name} (hidden units)" if name in place.hidden else name for name in place.layers
                ),
            )
            for place in self.places
        ]
        return "\n".join(table_lines([header, *rows], left=len(header) - 1))


def suggest(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    approximate: Collection[str] = (),
) -> Suggestions:
    """List the places of a model where noise would make structures removable.

    Every layer that `bmrs.add_noise` takes is tried: its last structure is pruned, together with the structures that it
    is added to. A place is listed if `bmrs.compact` would remove that structure.

    Args:
        model: a model that `bmrs.compact` takes, with or without noise, in any mode; it is left as it is.
        example_inputs: as for `bmrs.compact`.
        approximate: as for `bmrs.compact`.

    Returns:
        The places, the one that can save most parameters first.

    Raises:
        TypeError, ValueError: as `bmrs.compact`.
    """
    allowed = check_approximate(approximate)
    with torch.inference_mode(False), torch.no_grad():
        inputs = as_inputs(example_inputs)
        trial = evaluation_copy(model)
        refuse_torchscript(trial, "suggest")
        mark(
            trial,
            {name: torch.ones(len(layer.spread(layer.mu))) for name, layer in noise_layers(trial).items()},
        )
        names = [name for name, layer in trial.named_modules() if can_get_noise(layer)]
        if not names:
            return Suggestions(())
        recurrent = [name for name in names if isinstance(trial.get_submodule(name), nn.RNNBase)]
        if others := [name for name in names if name not in recurrent]:
            add_noise(trial, where=lambda name, _: name in others)
        if recurrent:
            options: dict[str, Any] = {"structures": "hidden", "granularity": "batch"}
            add_noise(trial, where=lambda name, _: name in recurrent, **options)
        factors = {name: torch.ones(layer.num_structures) for name, layer in noise_layers(trial).items()}
        mark(trial.eval(), factors)
        captured = capture(trial, inputs, "suggest", dynamic="first", approximate=allowed)
        return Suggestions(tuple(_places(captured, factors)))


def _places(captured: Captured, factors: dict[str, Tensor]) -> list[Suggestion]:
    # Noise that the model has already is none of the new layers', whose factors these are.
    together = ([name for name in group if name in factors] for group in same_channels(analyse(captured)))
    groups = [group for group in together if group]
    needed = needed_layers(captured, factors, groups)
    analysis = analyse(captured)
    places = []
    for group, names, sufficient in zip(
        groups, needed, sufficient_layers(captured, factors, groups), strict=True
    ):
        if names:
            named = {_host(name): _is_hidden(name) for name in sufficient or names}
            hidden = tuple(host for host, is_hidden in named.items() if is_hidden)
            worth = _worth(analysis, group[0])
            places.append(Suggestion(tuple(named), not sufficient, len(factors[group[0]]), *worth, hidden))
    return sorted(_joined(places), key=lambda place: -place.structures * place.parameters)


def _host(noise: str) -> str:
    """Return the name of the layer that a noise layer was put into, from the noise layer's."""
    return noise.rpartition(".noise")[0]


def _is_hidden(noise: str) -> bool:
    return not noise.endswith("noise")


def _joined(places: Sequence[Suggestion]) -> list[Suggestion]:
    """Return places with those of one recurrent layer, for its layers and directions, as one."""
    result: dict[tuple[tuple[str, ...], bool], Suggestion] = {}
    for place in places:
        key = (place.layers, place.together)
        if key not in result or not place.hidden:
            result[key] = place
            continue
        parts = (result[key], place)
        number = sum(part.structures for part in parts)
        parameters = sum(part.structures * part.parameters for part in parts) / number
        flops = sum(part.structures * part.flops for part in parts) / number
        result[key] = replace(place, structures=number, parameters=parameters, flops=flops)
    return list(result.values())


def _worth(analysis: Analysis, name: str) -> tuple[float, float]:
    """Return parameters and FLOPs of the last structure of a noise layer."""
    roots = analysis.findings.ties.roots()
    call = next(analysis.noise_calls(name))
    root = roots[call["x"].channels_along(call["dim"])[-1]]

    def share(layer: Tensor) -> float:
        (channels,) = without_repetition(layer)
        return float(((roots[channels] == root) & (channels != STAYS)).double().mean())

    trained = dict(analysis.captured.model.named_parameters())
    parameters = sum(
        value.shape.numel() * share(layer)
        for key, value in analysis.parameters.items()
        if key in trained
        for layer in value.layers
    )
    flops = 0.0
    for call in analysis.calls.values():
        if call.operator in GATES and call["input"]:
            steps = call["input"].shape[:-1].numel()
            matrices = [value for value in call["params"] if len(value.shape) == 2]
            flops += 2 * steps * sum(m.shape.numel() * share(layer) for m in matrices for layer in m.layers)
        weight = call["mat2"] if call.operator == "addmm" else call["weight"]
        if call.operator not in LINEAR and not call.operator.startswith("conv"):
            continue
        outputs = call.shape.numel() // (call.shape[-1] if call.operator in LINEAR else call.shape[1])
        flops += (
            2
            * outputs
            * weight.shape.numel()
            * sum(share(layer) for layer in weight.layers if varying_axes(layer))
        )
    return parameters, flops
