"""Outputs of a compacted network against those of the masked one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from bmrs.graph.capture import line_of_error
from bmrs.graph.copies import copied
from bmrs.graph.inputs import Inputs, map_tensors
from bmrs.graph.random_states import random_states_kept

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.125, torch.float16: 0.016}
"""Differences of outputs, relative to the largest, that rounding may make, by the dtype of parameters."""

_ROUNDINGS, _FAR_MORE = 16, 10
"""Errors of so many roundings are never looked into; in others, so many times what rounding makes is too much."""

_OF_DOUBLE_PRECISION = 1e-12
"""What arithmetic in float64 makes by itself, in another order, also of outputs that are small for what they are of."""


class OutputComparison:
    """Outputs of a masked network on examples, and the comparison of others with them.

    They are computed in float64, as TF32 and the like would make products of other shapes differ too much; in the
    network's own dtype if it has others written into its code.

    Args:
        masked: the masked network, in evaluation mode.
        inputs: the examples.
        autocast: whether it has torch.autocast in its code.
        approximation: what changes the functions of the masked network, if others are to equal it so changed; else
            None.

    Attributes:
        tolerance: largest difference that is accepted, relative to the largest output.

    Raises:
        ValueError: the network returns no tensor, or no finite number in float64 or its own dtype.
    """

    def __init__(
        self,
        masked: nn.Module,
        inputs: Inputs,
        *,
        autocast: bool = False,
        approximation: TorchFunctionMode | None = None,
    ) -> None:
        dtypes = {p.dtype for p in masked.parameters() if p.is_floating_point()}
        self.tolerance = max((TOLERANCES.get(dtype, 1e-4) for dtype in dtypes), default=1e-4)
        if autocast:
            self.allow(torch.float16)
        self._roundings = {dtype: torch.finfo(dtype).eps / 2 for dtype in dtypes}
        self._masked, self._inputs, self._approximation = masked, inputs, approximation
        self._double = True
        try:
            self._expected = outputs(masked, inputs, double=True, mode=approximation)
        except Exception:
            self._compare_in_its_own_dtype()
        if self._double and not all(map(all_finite, self._expected)):
            # A mask of the least number of single precision, say, is one of infinities in sums of float64.
            own = outputs(masked, inputs, double=False, mode=approximation)
            if _finite_values(own) > _finite_values(self._expected):
                self._compare_in_its_own_dtype()
        if not self._expected:
            raise ValueError(
                f"the model ({type(masked).__name__}) returns no tensor on example_inputs, so that nothing "
                "can be compared"
            )
        if any(t.numel() for t in self._expected) and not any(t.isfinite().any() for t in self._expected):
            raise ValueError(
                f"the model ({type(masked).__name__}) returns NaN and infinities alone on example_inputs, so that "
                "nothing can be compared: give examples on which it returns numbers"
            )

    @property
    def dtype(self) -> str:
        """What the outputs are computed in, as text."""
        return "float64" if self._double else "its own dtype"

    def _compare_in_its_own_dtype(self) -> None:
        """Compare from now on what networks compute as they are."""
        self._double = False
        self._expected = outputs(self._masked, self._inputs, double=False, mode=self._approximation)
        # It casts to another dtype in its code, single precision most often.
        self.allow(torch.float32)

    def allow(self, dtype: torch.dtype) -> None:
        """Accept what rounding to a dtype makes of the outputs."""
        self.tolerance = max(self.tolerance, TOLERANCES.get(dtype, 1e-4))

    def error(self, network: nn.Module) -> float:
        """Return the largest difference of the outputs, relative to the largest magnitude; inf if shapes differ."""
        return relative_difference(self._expected, outputs(network, self._inputs, double=self._double))

    def is_more_than_rounding(self, error: float) -> bool:
        """Return whether an error is far more than rounding of the parameters explains.

        Something else than asked for is then computed that matters little on these examples, such as attention that
        takes its scale from the width of its heads while all scores are near 0.
        """
        least = max(_ROUNDINGS * max(self._roundings.values(), default=0.0), _OF_DOUBLE_PRECISION)
        if not self._double or error <= least:
            return False
        rounded = outputs(self._masked, self._inputs, roundings=self._roundings, mode=self._approximation)
        return error > _FAR_MORE * relative_difference(self._expected, rounded)

    def check_that_it_repeats(self, masked: nn.Module) -> None:
        """Refuse a network that gives other outputs every time, which nothing can be compared with.

        Raises:
            ValueError: it does.
        """
        again = outputs(masked, self._inputs, double=self._double, mode=self._approximation, seed=1)
        if relative_difference(self._expected, again) > self.tolerance:
            raise ValueError(
                f"the model ({type(masked).__name__}) gives other outputs every time in evaluation mode, as with "
                "F.dropout(x) without training=self.training or torch.randn in forward, and a smaller one draws "
                "other numbers, so that it cannot be compared with it. Without removing anything, bmrs.fold(model) "
                "makes a network without noise layers"
            )

    def differences(self, masked: nn.Module, network: nn.Module) -> tuple[float, float]:
        """Return how much a network's outputs differ from those of the masked one, whatever is approximated.

        The largest difference is relative to the largest magnitude, the root mean square to that of the outputs.
        """
        expected, found = (outputs(n, self._inputs, double=self._double) for n in (masked, network))
        return relative_difference(expected, found), relative_root_mean_square(expected, found)

    def attempt(self, network: nn.Module, *, graph: bool = False) -> tuple[float, str]:
        """Return the error, and why the network cannot be used; "" if it can.

        In a graph, casts to the dtype of another tensor name the model's own. One that float64 does not fit for that is
        compared, as the masked network, in its own dtype.
        """
        error, failure = self._error_or_failure(network)
        if graph and failure and self._double:
            self._compare_in_its_own_dtype()
            error, failure = self._error_or_failure(network)
        if not failure and not error <= self.tolerance:
            failure = f"its outputs would differ by {error:.2g} of the largest"
        return error, failure

    def _error_or_failure(self, network: nn.Module) -> tuple[float, str]:
        """Return the error, and as text in what else it ends; "" if it runs."""
        try:
            return self.error(network), ""
        except Exception as failure:
            return torch.inf, in_one_line(failure)


def in_one_line(error: BaseException) -> str:
    """Return what an error says in one line, or where it comes from if it says nothing, as of a bare assertion."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    return f"{kind}: {lines[0]}" if lines else f"{kind}{line_of_error(error)}"


def outputs(
    model: nn.Module,
    inputs: Inputs,
    *,
    double: bool = True,
    roundings: Mapping[torch.dtype, float] | None = None,
    mode: TorchFunctionMode | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Return the tensors that a model returns, computed in float64 or as it is, with functions changed by a mode.

    With ``roundings`` its parameters, of these dtypes, are changed by that much up or down, relative to each. Random
    numbers, as variational autoencoders draw them, start from a seed, so that another network draws the same ones.
    """
    network = copied(model, share="parameters").eval()
    if double:
        _double_buffers(network)
        inputs = map_tensors(_double, inputs)
    # The mode inside, so that it is given the parameters themselves.
    parameters = _DoubleParameters(network, roundings or {}) if double else nullcontext()
    with random_states_kept(network, inputs, seed=seed), parameters, mode or nullcontext():
        return run(network, inputs)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the tensors that a model returns on inputs, which are left as they are."""
    args, kwargs = map_tensors(torch.clone, inputs)
    with without_fast_path():
        return _tensors(model(*args, **kwargs))


class _DoubleParameters(TorchFunctionMode):
    """Gives every function float64 copies of a network's parameters.

    They last for one call each, as all of them at once would take twice the memory of a network in single precision.
    """

    def __init__(self, network: nn.Module, roundings: Mapping[torch.dtype, float]) -> None:
        super().__init__()
        floating = (p for p in network.parameters() if p.is_floating_point())
        self._parameters = {id(parameter): number for number, parameter in enumerate(floating)}
        self._roundings = roundings

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._cast, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _cast(self, leaf: Any) -> Any:
        if id(leaf) not in self._parameters:
            return leaf
        double = leaf.detach().double()
        if not (rounding := self._roundings.get(leaf.dtype, 0.0)):
            return double
        # Without a generator, which torch.vmap would not allow.
        places = torch.arange(1, double.numel() + 1, dtype=double.dtype, device=double.device)
        signs = places.square_().mul_(self._parameters[id(leaf)] + 1.5).sin_().sign_()
        return double * signs.mul_(rounding).add_(1).view(double.shape)


def _double_buffers(network: nn.Module) -> None:
    doubles = {id(buffer): _double(buffer) for buffer in network.buffers()}
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = doubles[id(buffer)]


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity."""
    # A finite sum has finite parts only, and takes no memory.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _finite_values(tensors: list[Tensor]) -> int:
    return sum(int(tensor.isfinite().sum()) for tensor in tensors)


def cut_examples(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the first two examples, if the model's outputs for them do not depend on the others; otherwise all."""
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or max(sizes) <= 2:
        return inputs
    few, more = (map_tensors(lambda t, n=n: t[:n], inputs) for n in (2, 3))  # type: ignore[misc]
    try:
        first, second = (outputs(model, examples, double=False) for examples in (few, more))
    except Exception:
        return inputs
    same = len(first) == len(second) and all(
        b.shape[:1] == (3,)
        and a.shape == b[:2].shape
        and torch.allclose(a, b[:2], rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )
    return few if same else inputs


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Have torch's transformer layers compute as in training: their fast path leaves padded places out."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _tensors(result: Any) -> list[Tensor]:
    # Outputs of transformers' classes are mappings.
    leaves = tree_flatten(dict(result) if isinstance(result, Mapping) else result)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def relative_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference of two lists of outputs, relative to the largest magnitude in each."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return torch.inf
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() == 0:
            continue
        a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
        # Equal infinities, as in attention masks, differ by nothing, nor do NaN, as of rows that are masked in full.
        same = (a == b) | (a.isnan() & b.isnan())
        error = (a - b).abs().masked_fill(same, 0.0).max().item()
        scale = a.masked_fill(same & ~a.isfinite(), 0.0).abs().max().item()
        if error != error:
            return torch.inf
        largest = max(largest, error / scale if scale else error)
    return largest


def relative_root_mean_square(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the root mean square of differences, relative to that of what is expected; the largest of all outputs.

    What is the same infinity or NaN in both, as in attention masks, does not count.
    """
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
        counts = a.isfinite() | ((a != b) & ~(a.isnan() & b.isnan()))
        difference, scale = ((a - b)[counts].abs().norm().item(), a[counts].abs().norm().item())
        ratio = difference / scale if scale else difference
        if ratio != ratio:
            return torch.inf
        largest = max(largest, ratio)
    return largest
