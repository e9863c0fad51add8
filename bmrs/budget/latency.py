"""How long a network takes, from the times of its operations at a few widths.

An operation's tensors have sizes that depend on how many structures go. It is timed at up to four values of each such
size, alone, and between them the time is interpolated. The sum over operations says what narrower ones save; what
whole networks take in addition, and how much faster or slower operations are in company, is taken from two of them that
were compacted and timed. Times are medians of rounds in which all that is compared takes turns, so that what else the
machine does meets all of it alike.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from bmrs.compaction.cost_model import CostModel
from bmrs.compaction.operation_flops import Axis, arguments_of_sizes
from bmrs.graph.channels import varying_axes
from bmrs.graph.inputs import Inputs
from bmrs.graph.masked_graph import MaskedGraph
from bmrs.graph.operators import is_view
from bmrs.graph.rules import Call
from bmrs.graph.values import Value

Floats = NDArray[np.float64]

_LEVELS = 4
_ROUNDS = 7
_SECONDS = 20.0
# Of one measurement; shorter ones repeat.
_SHORTEST = 1e-3


@dataclass
class _Table:
    """Times of one operation.

    Attributes:
        base: sizes before, one for each size that changes.
        entries: what one structure of each group takes from them, (groups, sizes).
        levels: values of each that are timed, rising.
        times: milliseconds, with a dimension for each size.
    """

    base: Floats
    entries: Floats
    levels: list[Floats]
    times: Floats

    def __call__(self, pruned: Floats) -> Floats:
        sizes = self.base - pruned @ self.entries
        result = np.zeros(sizes.shape[:-1])
        below, shares = [], []
        for d, levels in enumerate(self.levels):
            last = max(len(levels) - 2, 0)
            place = np.clip(np.searchsorted(levels, sizes[..., d], side="right") - 1, 0, last)
            width = levels[np.minimum(place + 1, len(levels) - 1)] - levels[place]
            share = (sizes[..., d] - levels[place]) / np.where(width == 0, 1.0, width)
            below.append(place)
            shares.append(np.clip(share, 0.0, 1.0))
        for corner in itertools.product((0, 1), repeat=len(self.levels)):
            places = tuple(
                np.minimum(b + c, len(levels) - 1)
                for b, c, levels in zip(below, corner, self.levels, strict=True)
            )
            weight = np.ones(sizes.shape[:-1])
            for c, share in zip(corner, shares, strict=True):
                weight = weight * (share if c else 1.0 - share)
            result = result + weight * self.times[places]
        return result


class Latency:
    """Milliseconds of a network as a function of how many structures of each group are pruned.

    Args:
        graph: the network, captured with the batch that is timed.
        costs: its costs, with sizes of all operations.
        inputs: the batch.

    Attributes:
        batch: examples.
        threads: of torch on the CPU.
        device: where it runs.
    """

    def __init__(self, graph: MaskedGraph, costs: CostModel, inputs: Inputs) -> None:
        tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
        self.inputs, self.batch = inputs, len(tensors[0]) if tensors[0].dim() else 1
        self.threads, self.device = torch.get_num_threads(), str(tensors[0].device)
        self._tables: list[_Table] = []
        self._graph, self._costs = graph, costs
        self._scale, self._rest = 1.0, 0.0

    def of_networks(self, networks: Sequence[nn.Module]) -> list[float]:
        """Return the median milliseconds of whole networks, measured in turns."""
        args, kwargs = self.inputs
        makers = [functools.partial(functools.partial, network, *args, **kwargs) for network in networks]
        return _medians(makers, rounds=3 * _ROUNDS)

    def calibrate(self, large: Floats, large_time: float, small: Floats, small_time: float) -> None:
        """Time the operations, and fit the sum of their times to those of two whole networks."""
        self._tables = self._measured()
        sums = [float(self._sum(numbers)) for numbers in (large, small)]
        faster = large_time - small_time
        self._scale = faster / (sums[0] - sums[1]) if sums[0] > sums[1] and faster > 0 else 1.0
        self._rest = large_time - self._scale * sums[0]

    def __call__(self, pruned: Floats) -> Floats:
        """Return milliseconds, of shape (...), for numbers pruned of shape (..., groups)."""
        return self._rest + self._scale * self._sum(pruned)

    def _sum(self, pruned: Floats) -> Floats:
        total = np.zeros(pruned.shape[:-1])
        for table in self._tables:
            total = total + table(pruned)
        return total

    def _measured(self) -> list[_Table]:
        analysis = self._graph.without()
        tables: list[tuple[_Table, list[Any]]] = []
        runs: dict[Any, Callable[[], Callable[[], Any]]] = {}
        with torch.no_grad():
            for node, call in analysis.calls.items():
                table, its_runs = self._planned(node, call)
                if table is not None:
                    tables.append((table, list(its_runs)))
                    runs |= its_runs
            times = dict(
                zip(runs, _medians(list(runs.values()), rounds=_ROUNDS, seconds=_SECONDS), strict=True)
            )
        for table, keys in tables:
            table.times = np.array([times[key] for key in keys]).reshape(table.times.shape)
            for axis in range(table.times.ndim):
                # More is never faster; where it was measured so that is noise, or a width that hardware dislikes.
                table.times = np.maximum.accumulate(table.times, axis=axis)
        return [table for table, _ in tables]

    def _planned(
        self, node: fx.Node, call: Call
    ) -> tuple[_Table | None, dict[Any, Callable[[], Callable[[], Any]]]]:
        """Return a table to be filled, and what to run for it; None for an operation that takes the same or no time."""
        if is_view(call.target) or call.operator == "mark_noise":
            return None, {}
        sizes = self._costs.sizes
        places = {
            (name, d): sizes.place[axis]
            for name, value in call.arguments.items()
            if isinstance(value, Value)
            for layer in value.layers
            for d in varying_axes(layer)
            if (axis := Axis(node, name, d)) in sizes.place
        }
        moving = {key: i for key, i in places.items() if sizes.entries[:, i].any()}
        columns: dict[bytes, int] = {}
        for place in moving.values():
            columns.setdefault(np.append(sizes.entries[:, place], sizes.base[place]).tobytes(), place)
        if not columns or len(columns) > 3:
            return None, {}
        distinct = list(columns.values())
        base, entries = sizes.base[distinct], sizes.entries[:, distinct]
        most = np.array([len(units) for units in self._costs.units], dtype=np.float64)
        least = base - most @ entries
        levels = [np.unique(np.linspace(a, b, _LEVELS).round()) for a, b in zip(least, base, strict=True)]
        table = _Table(base, entries, levels, np.zeros([len(values) for values in levels]))
        runs: dict[Any, Callable[[], Callable[[], Any]]] = {}
        for point in itertools.product(*levels):
            by_column = dict(zip(columns, point, strict=True))
            shapes = {
                key: int(by_column[np.append(sizes.entries[:, i], sizes.base[i]).tobytes()])
                for key, i in moving.items()
            }
            make = functools.partial(_run, node, call, shapes)
            try:
                run = make()
                run()
            except (RuntimeError, ValueError, TypeError):
                return None, {}
            runs[_told_apart(run)] = make
        return table, runs


def _run(node: fx.Node, call: Call, sizes: dict[tuple[str, int], int]) -> functools.partial[Any]:
    """Return an operation on tensors of other sizes."""
    arguments = arguments_of_sizes(node, call, sizes, fill=1)
    groups = call["groups"] if call.operator.startswith("conv") else 1
    if groups > 1 and groups == call["weight"].shape[0]:
        arguments["groups"] = arguments["weight"].shape[0]
    return functools.partial(call.target, **arguments)


def _told_apart(run: functools.partial[Any]) -> tuple[Any, ...]:
    """Return what tells an operation on tensors of some sizes from others that take another time."""
    arguments = (
        (name, tuple(a.shape), a.dtype) if isinstance(a, Tensor) else (name, repr(a))
        for name, a in run.keywords.items()
    )
    return (run.func, *arguments)


def _medians(
    makers: Sequence[Callable[[], Callable[[], Any]]], *, rounds: int, seconds: float = 60.0
) -> list[float]:
    """Return median milliseconds of functions, in rounds; fewer than asked for where they take too long.

    Args:
        makers: what makes each function anew, so that its tensors need not be kept from round to round.
        rounds: how often each is timed.
        seconds: after which no further round begins.
    """
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    times: list[list[float]] = [[] for _ in makers]
    start = time.perf_counter()
    with torch.no_grad():
        for done in range(rounds + 1):
            if done > 1 and time.perf_counter() - start > seconds:
                break
            for make, found in zip(makers, times, strict=True):
                timer = Timer("run()", globals={"run": make()}, num_threads=threads)
                # The first time is not counted: it warms up, and says how often shorter ones repeat.
                number = max(1, min(100, int(_SHORTEST / max(found[0], 1e-7)))) if done else 1
                found.append(timer.timeit(number).mean)
    return [1e3 * float(np.median(found[1:])) for found in times]
