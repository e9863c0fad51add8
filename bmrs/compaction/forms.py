"""The forms that a smaller network can take, tried one after the other until one does what the masked model does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from bmrs.compaction.comparison import OutputComparison
from bmrs.compaction.cutting import Cut, cut, new_biases, shifts
from bmrs.compaction.description import UnsupportedError
from bmrs.compaction.flop_count import forward_flops
from bmrs.compaction.folding import Folding, fold_noise
from bmrs.compaction.graph_network import build_graph_network
from bmrs.compaction.kept_noise import narrowed_noise
from bmrs.compaction.masked_model import MaskedModel
from bmrs.compaction.record import joined
from bmrs.compaction.surgery import narrowed, queries_of_a_group, set_attributes, sizes_in_code
from bmrs.graph.analysis import Analysis, analyse
from bmrs.graph.capture import Captured, capture
from bmrs.graph.emptied import NOTHING, Emptied, emptied_layers
from bmrs.noise.layer import NoiseLayer

_MOST = 0.75
"""Share of the channels that could leave, with which own classes of equal parts are better than a graph without."""


@dataclass
class Form:
    """A smaller network, and what was done to make it.

    Attributes:
        kind: ``"module"`` of the model's own classes, or ``"graph"`` of its operators.
        analysis: what leaves.
        emptied: layers of which nothing is left.
        folding: how noise is folded.
        the_cut: its tensors.
        noise: narrower noise layers that stay, by name.
        network: the network; None if it cannot be made.
        error: the largest difference of its outputs from the masked model's, relative to the largest.
        failure: why it cannot be used, "" if it can.
        compared_in: what the outputs were computed in for that, as text.
        keeps: which sizes stay for the model's own code, that could otherwise leave: ``"parts"`` so much that what it
            divides into equal parts has as much in each, ``"split"`` all dimensions that it divides, as into heads.
        is_doubtful: whether its outputs differ by more than rounding makes, if within the tolerance.
        because: where the model's own classes cannot be narrower, or not all of them, why.
        sizes: numbers that were changed in the code of its layers, by path and name.
    """

    kind: Literal["module", "graph"]
    analysis: Analysis
    emptied: Emptied
    folding: Folding
    the_cut: Cut
    noise: dict[str, NoiseLayer]
    network: nn.Module | None = None
    error: float = math.inf
    failure: str = ""
    compared_in: str = ""
    keeps: Literal["", "parts", "split"] = ""
    is_doubtful: bool = False
    because: str = ""
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)


def find_form(
    subject: MaskedModel, analysis: Analysis, comparison: OutputComparison, *, keep_noise: bool
) -> Form:
    """Return the first form that does what the masked model does.

    Args:
        subject: the masked model.
        analysis: of its graph, with its masks.
        comparison: with the masked model.
        keep_noise: as for `bmrs.compact`.

    Raises:
        ValueError: the masked model does not repeat itself, or as `capture`, `analyse` and `narrowed_noise`.
        RuntimeError: no form does; it says why.
    """
    failures: dict[str, str] = {}
    doubtful: list[Form] = []
    forms = _forms(subject, analysis, comparison, keep_noise=keep_noise)
    while (form := _next(forms, raises=not doubtful)) is not None:
        form.compared_in = comparison.dtype
        if form.kind == "graph" or form.keeps:
            form.because = failures["module"]
        if not form.failure:
            form.is_doubtful = comparison.is_more_than_rounding(form.error)
            if not form.is_doubtful:
                return form
            doubtful.append(form)
        if not form.keeps:
            differs = f"its outputs would differ by {form.error:.2g} of the largest, which is more than rounding makes"
            failures[form.kind] = form.failure or differs
            if "multiple of 16 bytes" in form.failure:
                failures[form.kind] += " (grouped products of experts: round_to=8 gives such widths)"
        del form  # before there is another, unless it is the best so far
    if doubtful:
        return min(doubtful, key=lambda form: form.error)
    raise RuntimeError(
        "the compacted model's outputs are not the masked model's, relative tolerance "
        f"{comparison.tolerance:g}. With the model's own classes: {failures['module']}. As a graph of operators: "
        f"{failures['graph']}. Without removing anything, bmrs.fold(model) makes a network without noise layers"
    )


def _next(forms: Iterator[Form], *, raises: bool) -> Form | None:
    """Return the next form; None if there is none, or it cannot be made and need not, as there is one already."""
    try:
        return next(forms, None)
    except (ValueError, RuntimeError):
        if raises:
            raise
        return None


def _forms(
    subject: MaskedModel, analysis: Analysis, comparison: OutputComparison, *, keep_noise: bool
) -> Iterator[Form]:
    layers = subject.layers if keep_noise else {}
    captured = analysis.captured

    def analysed(captured: Captured, **options: bool) -> Analysis:
        return replace(analyse(captured, follow_constants=not keep_noise, **options), fits=analysis.fits)

    emptied = NOTHING if keep_noise else emptied_layers(analysis)
    yield _own_classes(analysis, comparison, layers, emptied)
    if emptied is not NOTHING:
        # Its code may ask for more of a layer than its outputs.
        yield _own_classes(analysis, comparison, layers)
    if analysis.written and captured.fixed_number() is not None:
        # A graph would take this number of examples and no other: rather less goes, of numbers written in code.
        yield _own_classes(analysed(captured, keep_written=True), comparison, layers)
    if not analysis.parts_are_equal():
        equal = analysed(captured, equal_parts=True)
        if equal.number_that_leave() >= _MOST * analysis.number_that_leave():
            form = _own_classes(equal, comparison, layers)
            form.keeps = "parts"
            yield form
            del form
        del equal
    comparison.check_that_it_repeats(subject.model)
    # With sizes of sequences as symbols, so that the graph takes other ones.
    flexible = capture(
        subject.model, subject.examples, "compact", dynamic="sequences", approximate=captured.approximate
    )
    graph = _graph(analysed(replace(flexible, moments=captured.moments)), comparison, layers)
    ran = None if graph.failure else graph.network
    costs_more = ran is not None and forward_flops(ran, subject.examples) > subject.flops
    less_use = costs_more or flexible.fixed_number() is not None
    if not less_use:
        yield graph
    # Rather less goes than nothing, or than into a graph that takes one number of examples, or that computes what the
    # model's code leaves out, such as experts.
    form = _own_classes(analysed(captured, keep_split=True, equal_parts=True), comparison, layers)
    form.keeps = "split"
    yield form
    del form
    if less_use:
        yield graph


def _own_classes(
    analysis: Analysis,
    comparison: OutputComparison,
    layers: Mapping[str, NoiseLayer],
    emptied: Emptied = NOTHING,
) -> Form:
    form = _without_network("module", analysis, layers, emptied)
    form.network = narrowed(analysis, form.the_cut, form.folding.remaining, form.noise)
    form.sizes = queries_of_a_group(analysis, form.network)
    set_attributes(form.network, form.sizes)
    form.error, form.failure = comparison.attempt(form.network)
    for guess in sizes_in_code(analysis, form.network) if form.failure else ():
        before = {
            path: {n: getattr(form.network.get_submodule(path), n) for n in new}
            for path, new in guess.items()
        }
        set_attributes(form.network, guess)
        error, failure = comparison.attempt(form.network)
        if not failure:
            form.error, form.failure, form.sizes = error, "", joined(form.sizes, guess)
            break
        set_attributes(form.network, before)
    return form


def _graph(analysis: Analysis, comparison: OutputComparison, layers: Mapping[str, NoiseLayer]) -> Form:
    form = _without_network("graph", analysis, layers, NOTHING)
    try:
        form.network = build_graph_network(analysis, form.the_cut, form.folding.remaining, form.noise)
        form.error, form.failure = comparison.attempt(form.network, graph=True)
    except UnsupportedError as unsupported:
        form.failure = str(unsupported)
    return form


def _without_network(
    kind: Literal["module", "graph"], analysis: Analysis, layers: Mapping[str, NoiseLayer], emptied: Emptied
) -> Form:
    """Return how noise is folded, the smaller tensors, and narrower ones of the noise layers that are to stay."""
    found = shifts(analysis, emptied)
    names = new_biases(analysis, found)
    folding = Folding([], {}) if layers else fold_noise(analysis, names)
    the_cut = cut(analysis, folding, found, names, emptied)
    noise = narrowed_noise(analysis, the_cut, layers)
    return Form(kind, analysis, emptied, folding, the_cut, noise)
