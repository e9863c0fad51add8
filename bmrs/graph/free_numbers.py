"""Whether a graph takes any number of examples, and does with more of them what the model does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_flatten

from bmrs.graph.copies import copied
from bmrs.graph.inputs import Inputs, map_tensors, more_examples
from bmrs.graph.nodes import operator_name
from bmrs.graph.random_states import random_states_kept


def fixed_number(program: ExportedProgram) -> int | None:
    """Return how many examples a graph takes if that is one number alone, None if it is free in one of the inputs."""
    own = {*program.graph_signature.user_inputs}
    values = [
        node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in own
    ]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    # A symbol that turned out to have one value alone stays a symbol.
    numbers = [size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size for size in sizes]
    return None if None in numbers or not numbers else numbers[0]


def has_number_of_parts(program: ExportedProgram) -> bool:
    """Return whether a graph has a number of parts in it, as of ``x.split(8)``, that follows from a size that is free.

    torch.export asks no more of that size than that so many parts are there: of a larger one the rest is left out.
    """
    for node in program.graph.nodes:
        name = operator_name(node) if node.op == "call_function" else ""
        if name not in ("split", "unsafe_split", "chunk", "unsafe_chunk"):
            continue
        x, number, axis = (*node.args, *node.kwargs.values(), 0)[:3]
        size = x.meta["val"].shape[axis]
        if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:
            continue
        if isinstance(number, fx.Node):
            number = number.meta["val"]
        if "chunk" in name:
            # Two parts are two of any size; more are as many where it can be divided by their number.
            if number > 2 and not statically_known_true(size % number == 0):
                return True
        elif not isinstance(number, list | tuple):
            parts = len(node.meta["val"])
            if not (
                statically_known_true(parts * number >= size)
                and statically_known_true((parts - 1) * number < size)
            ):
                return True
    return False


def is_right_for_more(program: ExportedProgram, model: nn.Module, example: Inputs) -> bool:
    """Return whether a graph whose number of examples is free does what the model does for more of them.

    It does not where the code has a number of steps that follows from that of the examples, as ``range(len(x) // 8)``.
    """
    if fixed_number(program) is not None:
        return True
    for odd in (True, False):  # some models take an even number alone
        more = more_examples(example, odd=odd)
        if more is None:
            return True
        try:
            wanted = _outputs(copied(model, share="parameters"), more)
            break
        except Exception:
            continue
    else:
        return True  # it takes no more
    number = next(leaf.shape[0] for leaf in tree_flatten(more)[0] if isinstance(leaf, Tensor))
    if any(number > most for most in _most_examples(program)):
        return True  # which it says
    try:
        found = _outputs(program.module(check_guards=False), more)
    except Exception:
        return False
    return len(wanted) == len(found) and all(map(_alike, wanted, found))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Return whether outputs agree, but for rounding; of complex ones the shapes."""
    if a.shape != b.shape or a.dtype.is_complex or not a.numel():
        return a.shape == b.shape
    a, b = a.double(), b.double()
    largest = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=1e-2 * largest, equal_nan=True)


def _most_examples(program: ExportedProgram) -> Iterator[float]:
    own = {*program.graph_signature.user_inputs}
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" and node.name in own else None
        size = value.shape[0] if isinstance(value, Tensor) and value.dim() else None
        if isinstance(size, torch.SymInt) and size.node.expr in program.range_constraints:
            yield float(program.range_constraints[size.node.expr].upper)


@torch.no_grad()
def _outputs(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run a network, which draws the same random numbers each time, and leave its buffers as they are."""
    args, kwargs = map_tensors(torch.clone, inputs)
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        with random_states_kept(network, inputs, seed=0):
            return [leaf for leaf in tree_flatten(network(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
    finally:
        for buffer, values in before:
            buffer.copy_(values)
