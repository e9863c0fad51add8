"""Which channels of a captured model can leave it: the rules, asked for every operation, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from bmrs.graph.capture import Captured
from bmrs.graph.channels import (
    AtLeastOne,
    EqualNumbers,
    Staying,
    compressed,
    smallest_staying,
    varying_axes,
    without_repetition,
)
from bmrs.graph.layer_norms import Fit, LayerNorm
from bmrs.graph.nodes import place_of
from bmrs.graph.operators import RESHAPINGS
from bmrs.graph.reader import NoOperatorError, Reader, UnknownSizeError, as_list
from bmrs.graph.rms_norms import RmsNorm
from bmrs.graph.rules import Call
from bmrs.graph.values import IT_IS_READ, Findings, Value

DIVIDED = "the model's own code divides it into"
"""What reasons start with where code that is kept takes sizes for granted."""


@dataclass(frozen=True)
class NormChange:
    """What makes up for the channels that leave a normalisation.

    Attributes:
        layer: its qualified name.
        weight: qualified name of its weight.
        attribute: of the layer, where it takes ε from.
        eps: the new ε.
        gain: factor on the weight.
        bias: qualified name of its bias, None if there is none.
        shift: what is added to what the weight multiplies, through the bias.
    """

    layer: str
    weight: str
    attribute: str
    eps: float
    gain: float
    bias: str | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Analysis:
    """What can leave a captured model.

    Attributes:
        captured: the model.
        findings: channels and constraints.
        values: of each node of the graph; a list for one with several results.
        calls: of each node that calls an operator.
        parameters: values of parameters and buffers by qualified name, once each.
        staying: the channels that stay with the masks as they are.
        norms: normalisations by the root mean square that zeros can leave, by the operation that takes it.
        layer_norms: layer norms that constants may leave, by their operation.
        written: whether channels were given to what is written in code, such as zeros that a loop starts from.
        read_in_batches: values that are read within torch.vmap, of which there are no calls.
        fits: what makes up for the channels that leave layer norms, by the name of the weight, as far as it is known.
    """

    captured: Captured
    findings: Findings
    values: dict[fx.Node, Any]
    calls: dict[fx.Node, Call]
    parameters: dict[str, Value]
    staying: Staying
    norms: dict[fx.Node, RmsNorm]
    layer_norms: dict[fx.Node, LayerNorm]
    fits: Mapping[str, Fit] = field(default_factory=dict)
    written: bool = False
    read_in_batches: tuple[Value, ...] = ()

    def share_left(self, node: fx.Node) -> float:
        """Return the share of the channels that is left in the statistics that a normalisation takes."""
        call = self.calls[node]
        x: Value = call["input"] or call["self"]
        return self.kept_shape(x)[-1] / x.shape[-1]

    def approximated(self) -> dict[fx.Node, LayerNorm]:
        """Return the layer norms that channels leave, by their operation."""
        return {node: norm for node, norm in self.layer_norms.items() if self.share_left(node) < 1}

    def changes(self) -> dict[fx.Node, NormChange]:
        """Return what changes in normalisations that channels leave, by their operation."""
        found = {}
        for node, norm in self.norms.items():
            if (left := self.share_left(node)) < 1:
                found[node] = NormChange(norm.layer, norm.weight, norm.attribute, norm.eps / left, left**-0.5)
        for node, layer_norm in self.approximated().items():
            if (fit := self.fits.get(layer_norm.weight)) is not None:
                own = (layer_norm.layer, layer_norm.weight, layer_norm.attribute)
                eps = layer_norm.eps / self.share_left(node)
                found[node] = NormChange(*own, eps, fit.gain, layer_norm.bias, fit.shift)
        return found

    def noise_calls(self, name: str | None = None) -> Iterator[Call]:
        """Iterate over the calls of noise layers, or of the one of a name, in an order of computation."""
        for call in self.calls.values():
            if call.operator == "mark_noise" and name in (None, call["name"]):
                yield call

    def stays(self, channels: Tensor) -> Tensor:
        """Return which channels are kept, bool of their shape."""
        return self.staying.of(channels)

    def kept(self, value: Value, axis: int) -> Tensor | None:
        """Return the entries of a value that are kept along a dimension, int64; None for all."""
        layer = value.layer_along(axis)
        if layer is None or not layer.numel():
            return None
        stays = self.stays(without_repetition(layer)[0])
        others = [d for d in range(stays.dim()) if d != axis % stays.dim()]
        stays = stays.any(dim=others) if others else stays
        return None if stays.all() else stays.nonzero().flatten()

    def kept_shape(self, value: Value) -> torch.Size:
        """Return the shape of what is kept of a value."""
        sizes = []
        for axis, size in enumerate(value.shape):
            kept = self.kept(value, axis)
            sizes.append(size if kept is None else len(kept))
        for layer in value.layers:
            *rows, last = varying_axes(layer) or (0,)
            number = int(self.stays(without_repetition(layer)[0]).sum())
            if rows:
                # As many in each row, but not always the same ones.
                sizes[last] = number // math.prod(sizes[axis] for axis in rows)
        return torch.Size(sizes)

    def parts_are_equal(self) -> bool:
        """Return whether as much stays of every part, if anything, of what the model's code divides into equal ones."""
        for _, rows in _equal_parts(self.calls, self.values):
            numbers = self.stays(rows).sum(dim=1)
            if len(numbers[numbers > 0].unique()) > 1:
                return False
        return True

    def number_that_leave(self) -> int:
        """Return how many of the channels leave that noise layers scale."""
        scaled = [channels for call in self.noise_calls() for channels in call["x"].layers]
        return sum(int((~self.stays(without_repetition(channels)[0])).sum()) for channels in scaled)

    def reasons(self, channels: Tensor) -> list[str]:
        """Return why channels stay, "" for those that leave, of channels of shape (number,)."""
        found, roots = [], self.findings.ties.roots()
        for root, cause in zip(
            roots[channels].tolist(), self.staying.cause_of(channels).tolist(), strict=True
        ):
            note, place = self.findings.notes[cause] if cause >= 0 else ("", "")
            if note == IT_IS_READ:
                of_constants = self.findings.constants.get(place, ())
                note = next((more for its, more in of_constants if (roots[its] == root).any()), note)
            found.append(f"{note} at {place}" if place else note)
        return found


def analyse(
    captured: Captured,
    *,
    follow_constants: bool = True,
    all_stay: bool = False,
    keep_written: bool = False,
    keep_split: bool = False,
    equal_parts: bool = False,
) -> Analysis:
    """Find the channels of a captured model that stay, by asking the rules for every operation.

    Args:
        captured: the model.
        follow_constants: see `Findings`.
        all_stay: whether all do, whatever is constant, as of a model that is described as it is.
        keep_written: whether what is written in code keeps its size, such as zeros that a loop starts from.
        keep_split: whether a dimension that is divided into several keeps its size, such as all heads of an attention.
        equal_parts: whether as much stays of every part of what is divided into equal ones.

    Raises:
        ValueError: the size of a tensor depends on values of the input, or a function is transformed, as by
            torch.func.grad; the place is named.
    """
    reader = Reader(captured, Findings(follow_constants=follow_constants))
    try:
        reader.run(captured.graph)
    except UnknownSizeError:
        raise ValueError(
            f"the sizes at {reader.findings.place} depend on values of a tensor{reader.line}, of the input or a mask "
            "of bools that picks, and channels cannot be followed through it; indices in place of a mask have a size. "
            "Without removing anything, bmrs.fold(model) makes a network without noise layers"
        ) from None
    except NoOperatorError:
        raise ValueError(
            f"channels cannot be followed through {reader.findings.place}{reader.line}, which is no operator but a "
            "part of torch.func.grad or the like: compute with whole tensors there instead. Without "
            "removing anything, bmrs.fold(model) makes a network without noise layers"
        ) from None
    for node in captured.graph.output_node().all_input_nodes:
        for value in as_list(reader.values.get(node)):
            reader.findings.place = "the model's output"
            reader.findings.stay_all(value, "it is an output of the model")
    findings = reader.findings
    _keep_what_is_written(reader, everything=keep_written)
    if keep_split:
        _keep_what_is_split(reader)
    if equal_parts:
        for place, rows in _equal_parts(reader.calls, reader.values):
            findings.place = place
            findings.add(EqualNumbers(rows), f"{DIVIDED} equal parts")
    unread = _unread(findings)
    if unread.numel():
        findings.place = ""
        findings.stay(unread, "nothing reads it in any case")
    staying = smallest_staying(findings.ties, findings.constraints, nothing_is_quiet=all_stay)
    return Analysis(
        *(captured, findings, reader.values, reader.calls, reader.parameters, staying),
        norms=reader.norms,
        layer_norms=reader.layer_norms,
        written=bool(reader.written),
        read_in_batches=tuple(reader.read_in_batches),
    )


def _keep_what_is_written(reader: Reader, *, everything: bool) -> None:
    """Keep zeros and the like that are written in code, but for those that meet channels with noise."""
    if not reader.written:
        return
    findings = reader.findings
    roots = findings.ties.roots()
    noisy = [
        roots[without_repetition(layer)[0].flatten()]
        for call in reader.calls.values()
        if call.operator == "mark_noise" and not everything
        for layer in call["x"].layers
    ]
    written = torch.cat([without_repetition(layer)[0].flatten() for layer in reader.written])
    with_noise = (
        torch.isin(roots[written], torch.cat(noisy)) if noisy else torch.zeros_like(written, dtype=torch.bool)
    )
    findings.place = ""
    findings.stay(written[~with_noise], "it is a number written in code")


def _keep_what_is_split(reader: Reader) -> None:
    findings = reader.findings
    for node, call in reader.calls.items():
        if call.operator not in RESHAPINGS:
            continue
        value = call["self"] or call["input"]
        for layer in value.layers:
            if len(varying_axes(compressed(layer.reshape(call.shape)))) > len(varying_axes(layer)):
                findings.place = place_of(node)
                findings.stay(layer, f"{DIVIDED} parts of its sizes")


def _equal_parts(
    calls: Mapping[fx.Node, Call], values: Mapping[fx.Node, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield for what is divided into equal parts along channels where that is, and the channels of each part."""
    for node, call in calls.items():
        if call.operator not in ("chunk", "split", "tensor_split"):
            continue
        parts = [part for part in as_list(values.get(node)) if isinstance(part, Value)]
        rows = [row for part in parts if (row := part.channels_along(call["dim"])) is not None]
        if len(rows) > 1 and len(rows) == len(parts) and len({len(row) for row in rows}) == 1:
            yield place_of(node), torch.stack(rows)


def _unread(findings: Findings) -> Tensor:
    """Return channels that nothing reads even if nothing is pruned, such as rows that a slice leaves out."""
    needs = [constraint for constraint in findings.constraints if not isinstance(constraint, AtLeastOne)]
    staying = smallest_staying(findings.ties, needs, nothing_is_quiet=True)
    channels = torch.arange(len(findings.ties))
    return channels[~staying.of(channels)]
