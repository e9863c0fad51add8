"""Weights of a compacted network refitted in closed form, so that its layers compute what the full network's do.

When structures leave, the layers that read them lose what they contributed. Much of it can be told from the structures
that stay: they are correlated. Layer by layer, from the input to the output, the weights and the bias of each linear
or convolution layer become those with which its outputs, computed from the compacted network's own inputs, are closest
in the mean square to the full network's outputs for the same examples: ordinary least squares with a ridge towards the
present weights, as strong as serves examples best that are left out at first. Later layers thus make up for the errors
of earlier ones. No gradient, no labels and no learning rate are involved. (Channel pruning by reconstruction: He, Zhang
& Sun 2017, arXiv 1707.06168.)
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bmrs.compaction.comparison import cut_examples
from bmrs.compaction.least_squares import RIDGE, RIDGES, NormalEquations
from bmrs.compaction.products import Product, products, watch
from bmrs.compaction.record import record_of
from bmrs.graph.analysis import Analysis
from bmrs.graph.inputs import Inputs, in_batches
from bmrs.graph.nodes import layer_of
from bmrs.graph.operators import CONVOLUTIONS, LINEAR

_PRODUCTS = {*LINEAR, *CONVOLUTIONS}
_BATCH = 100
# Equations for each unknown: of positions of feature maps beyond the most a random choice is taken, and with fewer than
# the least a layer keeps its weights where no examples can be left out.
_MOST_EQUATIONS, _LEAST_EQUATIONS = 100, 2
# One example of so many is left out to choose the ridge, of this many at least.
_LEFT_OUT, _LEAST_EXAMPLES = 5, 20
# Bytes of what the full network makes for several weights, so that it need not run again for each.
_MOST_BYTES = 2**29


@dataclass(frozen=True)
class _Weight:
    """A weight of a compacted network and the one that it comes from.

    Attributes:
        name: its qualified name, in the full network too.
        own: the weight.
        full: that of the full network.
        rows: outputs of the full one that are left, int64 of shape (outputs,).
    """

    name: str
    own: nn.Parameter
    full: nn.Parameter
    rows: Tensor

    @property
    def layer(self) -> str:
        """What users know it by."""
        return self.name.removesuffix(".weight")

    @property
    def unknowns(self) -> int:
        """Inputs that an output reads."""
        return self.own.numel() // len(self.rows)


def refit(
    compacted: nn.Module, analysis: Analysis, reference: nn.Module, inputs: Inputs, *, ridge: float | None
) -> None:
    """Refit a compacted network's linear and convolution layers, in place, in an order of execution.

    Depthwise convolutions and batch norms, which do not mix channels, keep their weights, and so do the projections
    that torch's attention makes of its input, layers that read what they read in the full network, such as the first
    one, and, with a warning, those with too few examples and those whose products cannot be seen.

    Args:
        compacted: the network, of the user's own classes or a graph, in evaluation mode.
        analysis: what it was made from.
        reference: the full network in evaluation mode, with weights of the same names, such as the trained one before
            noise was added.
        inputs: examples, the more the better: a few for each input of the widest layer at least.
        ridge: how much the present weights count, relative to the mean variance of a layer's inputs. None chooses it
            for each layer from `RIDGES` by examples that are left out, every fifth one, where there are 20 and the
            network's outputs for one do not depend on the others; elsewhere it is `RIDGE`.

    Raises:
        ValueError: the reference lacks a layer or has one of another kind, with fewer outputs, of another dtype or on
            another device, or one that is used another number of times; it is named.
    """
    weights = {weight.name: weight for weight in _weights(compacted, analysis, reference)}
    kept = _layers_that_keep_theirs(analysis)
    with torch.no_grad():
        independent = cut_examples(compacted, inputs) is not inputs
        leaves_out = ridge is None and independent and _number_of_examples(inputs) >= _LEAST_EXAMPLES
        batches, left_out = [inputs], []
        if independent:
            fitted, left = _parted(inputs) if leaves_out else (inputs, None)
            batches = list(in_batches(fitted, _BATCH))
            left_out = [] if left is None else list(in_batches(left, _BATCH))
        batches, fits_first = batches + left_out, len(batches)
        uses = _uses(compacted, {name: weight.own for name, weight in weights.items()}, batches[0])
        expected = _uses(reference, {name: weight.full for name, weight in weights.items()}, batches[0])
        seen: list[str] = []
        groups = [[weights[name] for name in group] for group in _groups(uses)]
        for part in _parts(groups, uses, len(batches)):
            together = [weight for group in part for weight in group]
            _check_numbers(together, uses, expected)
            targets = _targets(reference, together, batches, Counter(use.weight for use in expected))
            for group in part:
                fits = _read_of_a_group(compacted, reference, group, batches, targets, fits_first)
                for fit in fits:
                    fit.solve(ridge or RIDGE, chooses=leaves_out)
            seen += [weight.name for weight in together]
    unseen = [weight.layer for name, weight in weights.items() if name not in seen]
    # What torch's attention makes of its input never is, and need not be said of each.
    unseen = [layer for layer in unseen if not _is_of_attention(compacted, layer)]
    if kept := [*unseen, *kept]:
        warnings.warn(
            f"{', '.join(map(repr, kept))} keep their weights: refitting takes parameters that torch's linear and "
            "convolution functions are called with",
            stacklevel=3,
        )


def _weights(compacted: nn.Module, analysis: Analysis, reference: nn.Module) -> Iterator[_Weight]:
    """Yield the weights of linear layers and convolutions, in the order of their use."""
    present, record = dict(compacted.named_parameters(remove_duplicate=False)), record_of(compacted)
    users: dict[int, set[str]] = defaultdict(set)
    for call in analysis.calls.values():
        for value in call.values():
            users[id(value.tensor)].add(call.operator)
    seen = set()
    for call in analysis.calls.values():
        weight = call["mat2"] if call.operator == "addmm" else call["weight"]
        if call.operator not in _PRODUCTS or weight.parameter is None or weight.parameter in seen:
            continue
        seen.add(weight.parameter)
        # A table of an embedding, for one, says other things too.
        if not users[id(weight.tensor)] <= set(_PRODUCTS):
            continue
        axis = 1 if call.operator == "addmm" else 0
        # As it was cut, which may be less than the analysis allows.
        selection = record.selections.get(weight.parameter) if record is not None else None
        rows = torch.arange(weight.shape[axis]) if selection is None else selection.axes.get(axis)
        rows = torch.arange(weight.shape[axis]) if rows is None else rows.cpu()
        own = present.get(weight.parameter)
        if own is not None and own.numel():  # all of it may be gone
            full = _in_reference(weight.parameter, own, reference, rows, axis)
            yield _Weight(weight.parameter, own, full, rows)


def _is_of_attention(model: nn.Module, weight: str) -> bool:
    return isinstance(model.get_submodule(weight.rpartition(".")[0]), nn.MultiheadAttention)


def _layers_that_keep_theirs(analysis: Analysis) -> list[str]:
    """Return the names of linear layers and convolutions that compute their weights, as parametrisations do."""
    products = (
        (layer_of(node), call["weight"])
        for node, call in analysis.calls.items()
        if call.operator in _PRODUCTS and call.operator != "addmm"
    )
    computed = (path for path, weight in products if weight.parameter is None and weight.tensor is not None)
    return list(dict.fromkeys(computed))


def _in_reference(
    name: str, own: nn.Parameter, reference: nn.Module, rows: Tensor, axis: int
) -> nn.Parameter:
    """Return the weight of the full network that a weight comes from.

    Raises:
        ValueError: there is none that it could come from.
    """
    path, _, attribute = name.rpartition(".")
    layer = repr(name.removesuffix(".weight"))
    try:
        module = reference.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"refit_to must be the full network that was pruned, with a layer {layer}, got {type(reference).__name__}"
        ) from None
    found = getattr(module, attribute, None)
    outputs = found.shape[axis] if isinstance(found, Tensor) and found.dim() == own.dim() else 0
    if not isinstance(found, nn.Parameter) or outputs <= int(rows.max()):
        kind = "Linear" if own.dim() == 2 else f"Conv{own.dim() - 2}d"
        raise ValueError(
            f"layer {layer} of refit_to must be a {kind} with more than {int(rows.max())} outputs, got "
            f"{type(module).__name__} with {outputs}"
        )
    if (found.dtype, found.device) != (own.dtype, own.device):
        raise ValueError(
            f"refit_to must be {own.dtype} on {own.device} as the pruned network is, got {found.dtype} on "
            f"{found.device} in layer {layer}"
        )
    return found


class _Use(NamedTuple):
    """A product of a weight in a forward pass.

    Attributes:
        weight: its name.
        reads_the_same: whether the product before this one read the same tensor.
        positions: at which there are outputs, over all examples.
    """

    weight: str
    reads_the_same: bool
    positions: int


def _uses(model: nn.Module, weights: Mapping[str, Tensor], inputs: Inputs) -> list[_Use]:
    """Return the products of weights in a forward pass, in their order."""
    found: list[_Use] = []
    previous: tuple[Tensor, int] | None = None

    def see(product: Product, source: Tensor) -> None:
        nonlocal previous
        same = previous is not None and source is previous[0] and source._version == previous[1]
        found.append(_Use(product.weight, same, product.result.select(product.axis, 0).numel()))
        previous = (source, source._version)

    watch(model, inputs, weights, see)
    return found


def _groups(uses: Sequence[_Use]) -> list[list[str]]:
    """Return the names of weights, those together that are used once and read one tensor, in the order of their use."""
    numbers = Counter(use.weight for use in uses)
    groups: list[list[str]] = []
    last: list[str] = []
    for use in uses:
        if numbers[use.weight] > 1:
            if [use.weight] not in groups:
                groups.append([use.weight])
            last = []
        elif use.reads_the_same and last:
            last.append(use.weight)
        else:
            last = [use.weight]
            groups.append(last)
    return groups


def _check_numbers(weights: Sequence[_Weight], uses: Sequence[_Use], expected: Sequence[_Use]) -> None:
    for weight in weights:
        own, full = (sum(use.weight == weight.name for use in found) for found in (uses, expected))
        if own != full:
            raise ValueError(
                f"layer {weight.layer!r} of refit_to is used {full} times in a forward pass, and {own} times in the "
                "pruned network: give the network that was pruned"
            )


def _parts(
    groups: Sequence[list[_Weight]], uses: Sequence[_Use], batches: int
) -> Iterator[list[list[_Weight]]]:
    """Yield groups in parts for which the full network runs once."""
    positions: Counter[str] = Counter()
    for use in uses:
        positions[use.weight] += use.positions * batches
    part: list[list[_Weight]] = []
    size = 0
    for group in groups:
        its = sum(
            min(positions[w.name], _MOST_EQUATIONS * w.unknowns) * len(w.rows) * w.own.itemsize for w in group
        )
        if part and size + its > _MOST_BYTES:
            yield part
            part, size = [], 0
        part.append(group)
        size += its
    if part:
        yield part


class _Target(NamedTuple):
    """What the full network makes in one product, for outputs that are left.

    Attributes:
        positions: at which, int64 of shape (positions,), drawn at random.
        results: of shape (positions, outputs).
    """

    positions: Tensor
    results: Tensor


def _targets(
    reference: nn.Module, weights: Sequence[_Weight], batches: Sequence[Inputs], numbers: Mapping[str, int]
) -> dict[str, list[list[_Target]]]:
    """Run the full network, and return what it makes with weights: by name, for each batch and product.

    Args:
        reference: the full network.
        weights: those of the smaller one.
        batches: the examples.
        numbers: of products of each weight in a forward pass.
    """
    by_name = {weight.name: weight for weight in weights}
    generators = {name: torch.Generator().manual_seed(0) for name in by_name}
    sizes = [_number_of_examples(batch) for batch in batches]
    targets: dict[str, list[list[_Target]]] = {name: [] for name in by_name}

    def see(product: Product, source: Tensor) -> None:
        weight = by_name[product.weight]
        result = product.result.movedim(product.axis, -1)[..., weight.rows.to(product.result.device)]
        most = _MOST_EQUATIONS * weight.unknowns * size // (sum(sizes) * numbers[weight.name])
        # At random: a regular stride would meet the same few positions in every feature map.
        drawn = torch.randperm(result[..., 0].numel(), generator=generators[weight.name])[: max(1, most)]
        positions = drawn.to(result.device)
        targets[weight.name][-1].append(_Target(positions, result.flatten(0, -2)[positions]))

    full = {weight.name: weight.full for weight in weights}
    for batch, size in zip(batches, sizes, strict=True):  # noqa: B007 - read by `see`
        for its in targets.values():
            its.append([])
        watch(reference, batch, full, see, number=sum(numbers[name] for name in full))
    return targets


def _read_of_a_group(
    compacted: nn.Module,
    reference: nn.Module,
    group: Sequence[_Weight],
    batches: Sequence[Inputs],
    targets: Mapping[str, list[list[_Target]]],
    fits_first: int,
) -> list[_Fit]:
    """Return the problems of weights that do not read what others of them make, without those that read the same.

    The batches behind the first ``fits_first`` are left out to choose the ridge.
    """
    own = {weight.name: weight.own for weight in group}
    full = {weight.name: weight.full for weight in group}
    first = products(compacted, batches[0], own)
    number = sum(map(len, first.values()))
    expected = products(reference, batches[0], full, number=number)
    fits = []
    for weight in group:
        its_first, its_expected = first[weight.name], expected[weight.name]
        same = all(torch.equal(a.read, b.read) for a, b in zip(its_first, its_expected, strict=True))
        if not same and not its_first[0].is_depthwise:
            fits.append(_Fit(weight, its_first))
    for place, batch in enumerate(batches if fits else ()):
        if place == fits_first:
            for fit in fits:
                fit.choose_by_what_follows()
        found = products(compacted, batch, own, number=number)
        for fit in fits:
            fit.add(found[fit.weight.name], targets[fit.weight.name][place])
    return fits


class _Fit:
    """The least squares problem of one weight.

    A bias that is computed, or that is not the same in all products, stays as it is.

    Args:
        weight: the weight.
        products: what it is multiplied with in a forward pass.
    """

    def __init__(self, weight: _Weight, products: Sequence[Product]) -> None:
        product = products[0]
        self.weight, self._product = weight, product
        own = isinstance(product.bias, nn.Parameter) and all(p.bias is product.bias for p in products)
        self._bias = product.bias if own else None
        rows = weight.own.T if product.transposed else weight.own.flatten(1)
        parts = rows.double().chunk(product.groups)
        self._equations = [NormalEquations(part, shifts=self._bias is not None) for part in parts]

    def add(self, found: Sequence[Product], wanted: Sequence[_Target]) -> None:
        """Add what the weight read in a batch, and what the full network made of its own then."""
        groups = self._product.groups
        for product, target in zip(found, wanted, strict=True):
            made = target.results
            if product.bias is not None and self._bias is None:
                shape = product.result.movedim(product.axis, -1).shape
                made = made - product.bias.expand(shape).flatten(0, -2)[target.positions]
            reads, results = product.read.chunk(groups, product.axis), made.chunk(groups, -1)
            for part, x, y in zip(self._equations, reads, results, strict=True):
                part.add(product.features(x).flatten(0, -2)[target.positions].double(), y.double())

    def choose_by_what_follows(self) -> None:
        """Keep what is added from now on apart, to choose the ridge by, until it is solved."""
        for part in self._equations:
            part.part_here()

    def solve(self, ridge: float, *, chooses: bool) -> None:
        """Change the weight and its bias, or warn that there are too few examples.

        Args:
            ridge: as of `refit`.
            chooses: whether the best of `RIDGES` is taken instead, for examples that were kept apart.
        """
        own, bias = self.weight.own, self._bias
        if not chooses and self._equations[0].count < _LEAST_EQUATIONS * self.weight.unknowns:
            warnings.warn(
                f"layer {self.weight.layer!r} keeps its weights, as {self._equations[0].count} examples (positions of "
                f"feature maps count) are too few to refit its {self.weight.unknowns} inputs; give at least "
                f"{_LEAST_EQUATIONS * self.weight.unknowns}",
                stacklevel=5,
            )
            return
        if chooses:
            errors = [part.errors(RIDGES) for part in self._equations]
            ridge = RIDGES[int(torch.stack(errors).sum(0).argmin())]
        solutions = [part.solve(ridge) for part in self._equations]
        if not all(bool(tensor.isfinite().all()) for solution in solutions for tensor in solution):
            raise ValueError(
                f"layer {self.weight.layer!r} cannot be refitted: on example_inputs it reads or is to return NaN or "
                "infinite values"
            )
        rows = own.T if self._product.transposed else own.flatten(1)
        # Pruned structures that stay, in rows of zeros, stay pruned.
        dead = ~rows.any(dim=1)
        if bias is not None:
            dead &= bias == 0
            bias.copy_(torch.cat([shift for _, shift in solutions]).masked_fill(dead, 0.0))
        found = torch.cat([weight for weight, _ in solutions]).masked_fill(dead[:, None], 0.0)
        own.copy_(found.T if self._product.transposed else found.view_as(own))


def _number_of_examples(inputs: Inputs) -> int:
    return next(len(leaf) for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.dim())


def _parted(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Return examples, and every fifth one, which is not among the former."""
    leaves, tree = tree_flatten(inputs)
    number = _number_of_examples(inputs)
    left = torch.arange(number) % _LEFT_OUT == _LEFT_OUT - 1

    def of(chosen: Tensor) -> Inputs:
        picked = [leaf[chosen.to(leaf.device)] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(picked, tree)

    return of(~left), of(left)
