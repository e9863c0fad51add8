"""Which noise layers have to prune a channel together, and which layers make what a noise layer scales."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bmrs.graph.analysis import Analysis, analyse
from bmrs.graph.capture import Captured, capture, mark
from bmrs.graph.copies import evaluation_copy
from bmrs.graph.inputs import as_inputs
from bmrs.noise.hooks import added_noise
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers
from bmrs.noise.producers import is_producer
from bmrs.noise.wrappers import inside_wrappers


def same_channels(analysis: Analysis) -> list[list[str]]:
    """Return the noise layers in groups that scale the same channels, as structures of one size, in order of use."""
    roots = analysis.findings.ties.roots()
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)  # by size, and channels
    for call in analysis.noise_calls():
        channels = call["x"].channels_along(call["dim"])
        if channels is not None and not (channels < 0).any():
            key = (call["structure_size"], *roots[channels].tolist())
            names = groups[key]
            if call["name"] not in names:
                names.append(call["name"])
    return list(groups.values())


def needed_layers(
    captured: Captured, factors: Mapping[str, Tensor], groups: Sequence[Sequence[str]]
) -> list[list[str] | None]:
    """Find as few layers of each group as can let a channel leave together; where several would do, the last.

    Args:
        captured: the model.
        factors: of its noise layers by name, all 1; they are changed for the trials, which look at the last channel.
        groups: names of noise layers that scale the same channels.

    Returns:
        For each group the names, None if the channel stays even if all of them prune it.
    """
    needed: list[list[str]] = [list(group) for group in groups]
    _prune_last(factors, needed)
    analysis = analyse(captured)
    removable = [last_channel_leaves(analysis, group[0]) for group in groups]
    spare = _spare_layers(captured, factors, groups)
    for turn in range(max(map(len, spare), default=0)):
        # One fewer in every group at once.
        fewer = [
            [name for name in names if [name] != its_spare[turn : turn + 1]]
            for names, its_spare in zip(needed, spare, strict=True)
        ]
        _prune_last(factors, fewer)
        analysis = analyse(captured)
        needed = [
            few if few and last_channel_leaves(analysis, group[0]) else names
            for few, names, group in zip(fewer, needed, groups, strict=True)
        ]
    _prune_last(factors, [])
    return [names if ok else None for names, ok in zip(needed, removable, strict=True)]


def sufficient_layers(
    captured: Captured, factors: Mapping[str, Tensor], groups: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Return the layers of each group that can let a channel leave alone; arguments as of `needed_layers`."""
    found: list[list[str]] = [[] for _ in groups]
    for turn in range(max(map(len, groups), default=0)):
        for group in groups:
            for i, name in enumerate(group):
                factors[name][-1] = 0.0 if i == turn else 1.0
        analysis = analyse(captured)
        for names, group in zip(found, groups, strict=True):
            names += [name for name in group[turn : turn + 1] if last_channel_leaves(analysis, name)]
    return found


def _spare_layers(
    captured: Captured, factors: Mapping[str, Tensor], groups: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Return the layers of each group without any one of which a channel leaves too; most often none."""
    found: list[list[str]] = [[] for _ in groups]
    places = [0] * len(groups)
    while any(place < len(group) for place, group in zip(places, groups, strict=True)):
        for tensor in factors.values():
            tensor.fill_(1.0)
        trials: list[list[str]] = []
        for g, group in enumerate(groups):
            # Each channel but the last, which stays, tries another layer.
            trials.append(list(group[places[g] : places[g] + max(1, len(factors[group[0]]) - 1)]))
            places[g] += len(trials[g])
            for channel, left_out in enumerate(trials[g]):
                for name in group:
                    factors[name][channel] = float(name == left_out)
        analysis = analyse(captured)
        for g, group in enumerate(groups):
            leaves = _leaving_channels(analysis, group[0])
            found[g] += [name for name, gone in zip(trials[g], leaves, strict=False) if gone]
    return found


def _prune_last(factors: Mapping[str, Tensor], groups: Sequence[Sequence[str]]) -> None:
    """Prune the last structure of the layers of some groups, and nothing else."""
    for tensor in factors.values():
        tensor.fill_(1.0)
    for group in groups:
        for name in group:
            factors[name][-1] = 0.0


def _leaving_channels(analysis: Analysis, name: str) -> list[bool]:
    for call in analysis.noise_calls(name):
        channels = call["x"].channels_along(call["dim"])
        if channels is not None:
            leaves: list[bool] = (~analysis.stays(channels)).tolist()
            return leaves
    return []


def last_channel_leaves(analysis: Analysis, name: str) -> bool:
    """Return whether the last channel that a noise layer scales leaves."""
    for call in analysis.noise_calls(name):
        channels = call["x"].channels_along(call["dim"])
        return channels is not None and not bool(analysis.stays(channels[-1:]).any())
    return False


def producers(
    model: nn.Module,
    purpose: str,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
) -> dict[NoiseLayer, nn.Module]:
    """Find the linear or convolution layer whose output each noise layer scales, through other operations or not.

    Args:
        model: the model.
        purpose: who asks, for errors.
        example_inputs: an input, if there is one; otherwise torch.fx has to be able to trace the model, unless all
            noise was added to such layers.

    Returns:
        The producer of each noise layer that has a single one.

    Raises:
        ValueError: the model cannot be followed.
    """
    model = inside_wrappers(model)
    found: dict[NoiseLayer, nn.Module] = {}
    for module in model.modules():
        noise = added_noise(module)
        if noise is not None and is_producer(module):
            found[noise] = module
    layers = noise_layers(model)
    if len(found) == len(layers):
        return found
    if example_inputs is None:
        return {**_traced_producers(model, purpose), **found}
    names = {name: layer for name, layer in layers.items() if layer not in found}
    return {**found, **_captured_producers(model, purpose, example_inputs, names)}


def _captured_producers(
    model: nn.Module, purpose: str, example_inputs: Any, layers: Mapping[str, NoiseLayer]
) -> dict[NoiseLayer, nn.Module]:
    masked = evaluation_copy(model)
    mark(masked, {name: layer.spread(layer.mu.detach()) for name, layer in noise_layers(masked).items()})
    captured = capture(masked, as_inputs(example_inputs), purpose)
    found = {}
    for node in captured.graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.bmrs.mark_noise.default:
            continue
        layer, source = layers.get(node.args[3]), node.args[0]
        while layer is not None and isinstance(source, fx.Node):
            weights = [captured.names.get(n.name, "") for n in source.all_input_nodes]
            path = next((n.rpartition(".")[0] for n in weights if n.rpartition(".")[2] == "weight"), None)
            module = None if path is None else model.get_submodule(path)
            if module is not None and is_producer(module):
                found[layer] = module
                break
            inputs = [n for n in source.all_input_nodes if n.name not in captured.tensors]
            source = inputs[0] if len(inputs) == 1 else None
    return found


class _Tracer(fx.Tracer):
    """Records noise layers as single calls, those behind a layer's forward hook included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NoiseLayer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        noise = added_noise(m)
        # Hooks of other modules run while these are traced through; those of a recorded call do not.
        if noise is not None and self.is_leaf_module(m, self.path_of_module(m)):
            return self.call_module(noise, noise.forward, (output,), {})
        return output


def _traced_producers(model: nn.Module, purpose: str) -> dict[NoiseLayer, nn.Module]:
    # Inside a container, so that the model is itself called as a module, hooks included.
    root = nn.Sequential(model)
    try:
        graph = _Tracer().trace(root)
    except Exception as error:
        raise ValueError(
            f"{purpose} follows the model with torch.fx, which failed on {type(model).__name__}: {error}. "
            "Give example_inputs, so that torch.export can be used"
        ) from error
    modules = dict(root.named_modules())
    found: dict[NoiseLayer, nn.Module] = {}
    for node in graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        while isinstance(layer, NoiseLayer):
            sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
            if len(sources) != 1:
                break
            (node,) = sources
            producer = modules.get(str(node.target)) if node.op == "call_module" else None
            if producer is not None and is_producer(producer):
                found[layer] = producer
                break
    return found
