"""What a report of compaction says of a network, found from its graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from bmrs.compaction.comparison import OutputComparison
from bmrs.compaction.folding import Folding
from bmrs.compaction.report import Approximated, LayerCompaction, NormApproximation
from bmrs.graph.analysis import Analysis
from bmrs.graph.capture import MarkedNoise
from bmrs.graph.channels import without_repetition
from bmrs.graph.emptied import NOTHING, Emptied
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers

_NO_CHANNEL = "it multiplies what always stays"


def layer_report(
    analysis: Analysis,
    emptied: Emptied,
    folding: Folding,
    name: str,
    layer: NoiseLayer,
    given_back: int,
    noise: Mapping[str, NoiseLayer],
) -> LayerCompaction:
    """Return what became of the structures of one noise layer.

    Args:
        analysis: of the masked network.
        emptied: layers that compute nothing any more.
        folding: how noise is folded.
        name: of the noise layer.
        layer: itself.
        given_back: how many of its structures were.
        noise: narrower noise layers, where noise stays.
    """
    entries = reasons_of_entries(analysis, name, emptied)
    reasons: Counter[str] = Counter()
    removed = 0
    for structure in (~layer.mask).nonzero().flatten().tolist():
        first = structure * layer.structure_size
        reason = next((r for r in entries[first : first + layer.structure_size] if r), "")
        if reason or not entries:
            reasons[reason or "the model does not use it"] += 1
        else:
            removed += 1
    return LayerCompaction(
        name=name,
        structures=layer.num_structures,
        pruned=int((~layer.mask).sum()),
        given_back=given_back,
        removed=removed,
        kept_because=dict(reasons),
        folded=name not in folding.remaining and name not in noise,
        not_folded_because="keep_noise" if name in noise else folding.remaining.get(name, ""),
        noise_kept=int(noise[name].mask.sum()) if name in noise else None,
    )


def unused_parameters(analysis: Analysis) -> tuple[str, ...]:
    """Return names of parameters that evaluation does not use, such as those of heads that only training has."""
    used = _used(analysis)
    return tuple(name for name, p in analysis.captured.model.named_parameters() if id(p) not in used)


def unused_buffers(analysis: Analysis) -> tuple[str, ...]:
    """Return names of buffers of several numbers that evaluation does not use."""
    used = _used(analysis)
    buffers = analysis.captured.model.named_buffers()
    return tuple(name for name, tensor in buffers if tensor.numel() > 1 and id(tensor) not in used)


def _used(analysis: Analysis) -> set[int]:
    values = [value for call in analysis.calls.values() for value in call.values()]
    return {id(value.tensor) for value in (*values, *analysis.read_in_batches) if value.tensor is not None}


def reasons_of_entries(analysis: Analysis, name: str, emptied: Emptied = NOTHING) -> list[str]:
    """Return why each entry along a noise layer's dimension stays, "" where it leaves; [] if it is never called."""
    reasons: list[str] = []
    for node, call in analysis.calls.items():
        if call.operator != "mark_noise" or call["name"] != name:
            continue
        axis, value = call["dim"] % len(call.shape), call["x"]
        reasons = reasons or [""] * call.shape[axis]
        layer = value.layer_along(axis)
        if node in emptied.dead:
            continue
        if layer is None:
            return [_NO_CHANNEL] * len(reasons)
        (channels,) = without_repetition(layer)
        channels = channels.movedim(axis, 0).reshape(len(reasons), -1)
        stay = analysis.stays(channels)
        entries = stay.any(dim=1).nonzero().flatten()
        first = channels[entries, stay[entries].int().argmax(dim=1)]
        for entry, reason in zip(entries.tolist(), analysis.reasons(first), strict=True):
            reasons[entry] = reasons[entry] or reason or _NO_CHANNEL
    return reasons


def approximated_norms(
    analysis: Analysis,
    emptied: Emptied,
    comparison: OutputComparison,
    masked: nn.Module,
    result: nn.Module,
) -> Approximated | None:
    """Return which layer norms lost channels and how far the outputs are off for it; None if there are none."""
    norms = {}
    for node, norm in analysis.approximated().items():
        if node in emptied.dead:
            continue
        before = analysis.calls[node]["input"].shape[-1]
        norms[norm.layer] = NormApproximation(
            norm.layer, before, round(before * analysis.share_left(node)), dropped=norm.dropped
        )
    return Approximated(tuple(norms.values()), *comparison.differences(masked, result)) if norms else None


def number_of_values(model: nn.Module) -> int:
    """Return the number of parameters, without those of noise."""
    noise = {id(p) for layer in noise_layers(model).values() for p in layer.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in noise)


def number_of_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, without those of noise."""
    tensors = {
        id(tensor): tensor
        for module in model.modules()
        if not isinstance(module, MarkedNoise | NoiseLayer)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
