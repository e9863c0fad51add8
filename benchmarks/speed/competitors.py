"""Who competes in the timings of functions, here and in the GPU check; each is checked before it is timed.

The competitors are the project's backends, the plain formulas ("plain"), these under torch.compile ("compiled"), and a
copy of as many bytes as the direction has to move ("copy").
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks.rivals import plain
from benchmarks.speed.function_cases import DIRECTIONS, DTYPES, FunctionCase
from benchmarks.speed.stopwatch import Call, peak_bytes
from bmrs_kernels.dispatch import backend
from bmrs_kernels.options import Backend

SEED = 20_240_602
# Largest difference over the largest value.
TIGHT, LOOSE = {"float32": 1e-5, "bfloat16": 1e-2}, {"float32": 1e-3, "bfloat16": 2e-2}
# In float32, Eq. 8 as printed has no right digit with the default spread of the reduced prior.
PLAIN_IS_RIGHT_WITH: dict[str, dict[str, Any]] = {"delta_f_lognormal": {"prior_std": 1e-2}}

Function = Callable[..., Tensor]
Compiler = Callable[[Function], Function]


def project_backends(device: torch.device) -> tuple[Backend, ...]:
    """Return the project's backends for a device's tensors, first the one that "auto" takes."""
    if device.type == "cuda":
        return ("triton", "torch") if backend.TRITON_IS_INSTALLED else ("torch",)
    return ("numba", "torch") if backend.numba_is_usable() else ("torch",)


def competitors_of(case: FunctionCase, device: torch.device) -> tuple[str, ...]:
    """Return the names of a case's competitors."""
    return (*project_backends(device), "plain", *(["compiled"] if case.compiled else []), "copy")


def compiler() -> Compiler:
    """Return torch.compile for one shape, whose backward can be run, and so timed, several times."""
    import torch._functorch.config

    # Otherwise the compiled backward overwrites what forward saved for it.
    torch._functorch.config.donated_buffer = False
    torch.compiler.reset()
    return functools.partial(torch.compile, dynamic=False)


def directions_of(function: Function, inputs: Sequence[Tensor], grad: Tensor) -> dict[str, Call]:
    """Return calls for forward, backward and both; runs forward once."""
    out = function(*inputs)
    return {
        "forward": lambda: function(*inputs),
        "backward": lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True),
        "both": lambda: torch.autograd.grad(function(*inputs), inputs, grad),
    }


def copy_of(num_bytes: int, device: torch.device) -> functools.partial[Tensor]:
    """Return a copy that moves so many bytes: half of them read, half written."""
    source = torch.randn(-(-num_bytes // 8), device=device).view(torch.uint8)[: num_bytes // 2]
    return functools.partial(torch.empty_like(source).copy_, source)


def posteriors(count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return leaf tensors μ and log σ inside the interval, where every plain formula holds in float32."""
    mu = torch.linspace(-5.0, -4.0, count, device=device, dtype=dtype).requires_grad_()
    return mu, torch.full((count,), 0.3, device=device, dtype=dtype).requires_grad_()


class Contest:
    """The competitors of a case on the same inputs.

    Args:
        case: what they compete in.
        device: where.
    """

    def __init__(self, case: FunctionCase, device: torch.device) -> None:
        self.case, self.device = case, device
        activation = case.activation
        parameters: tuple[Tensor, ...] = posteriors(activation.structures, device)
        # Random, since some chips are faster on zeros; positive, so that means say something.
        x, self.grad = (
            activation.laid_out((torch.rand(activation.shape, device=device) + 0.5).to(DTYPES[case.dtype]))
            for _ in range(2)
        )
        self.uniform = bmrs_kernels.philox_uniform(SEED, activation.shape, device=device)
        if case.function == "sample_noise":
            parameters = tuple(
                plain.along(each.detach(), x, activation.dim).requires_grad_() for each in parameters
            )
        self.inputs = parameters
        if case.function == "multiply_noise":
            self.inputs = (x.requires_grad_(), *parameters)
        elif case.function == "philox_uniform":
            self.inputs = ()
        self._calls: dict[str, dict[str, Call]] = {}

    def call(self, competitor: str, direction: str) -> Call:
        """Return what is to be timed.

        Raises:
            AssertionError: the competitor's output is wrong.
        """
        if competitor not in self._calls:
            self._calls[competitor] = self._prepared(competitor)
        return self._calls[competitor][direction]

    def saved_for_backward(self, competitor: str) -> dict[str, float]:
        """Return what forward keeps for backward, in units of x: "inputs", which are there anyway, and "others"."""
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = self.call(competitor, "forward")()
        inputs = {each.untyped_storage().data_ptr() for each in (*self.inputs, self.uniform)}
        sizes = {"inputs": 0, "others": 0}
        for address, storage in storages.items():
            sizes["inputs" if address in inputs else "others"] += storage.nbytes()
        del out
        return {name: size / self.case.tensor_bytes for name, size in sizes.items()}

    def peak_memory(self, competitor: str, direction: str) -> float | None:
        """Return the largest memory allocated during a call, in units of x; None on a CPU."""
        peak = peak_bytes(self.call(competitor, direction), self.device)
        return None if peak is None else peak / self.case.tensor_bytes

    def _prepared(self, competitor: str) -> dict[str, Call]:
        if competitor == "copy":
            copies = {
                each: copy_of(self.case.bytes_moved(each), self.device) for each in self.case.directions
            }
            for copy in copies.values():
                (source,) = copy.args
                assert torch.equal(copy(), source), "the copy differs from its source"
            return {**copies}
        with warnings.catch_warnings():
            # The compilers warn about themselves.
            warnings.simplefilter("ignore")
            function = self._function(competitor)
            self._check(competitor, function)
            if self.case.directions != DIRECTIONS:
                return {"forward": functools.partial(function, *self.inputs)}
            calls = directions_of(function, self.inputs, self.grad)
            calls["backward"]()
        return calls

    def _function(self, competitor: str, *, fixed: bool = False, **options: Any) -> Function:
        """Return a competitor's function of the inputs; ``fixed`` gives it the uniforms that belong to the seed."""
        case = self.case
        of_project = competitor not in ("plain", "compiled")
        if of_project:
            options["backend"] = competitor
        if case.function == "philox_uniform":
            draw = functools.partial(bmrs_kernels.philox_uniform, SEED) if of_project else torch.rand
            return functools.partial(draw, case.activation.shape, device=self.device, **options)
        function = getattr(bmrs_kernels if of_project else plain, case.function)
        if case.function == "sample_noise":
            options["uniform"] = self.uniform
        if case.function == "multiply_noise":
            options |= {"dim": case.activation.dim, "granularity": case.granularity}
            if fixed:
                shape = plain.draw_shape(self.inputs[0].shape, case.activation.dim, case.granularity or "")
                uniform = bmrs_kernels.philox_uniform(SEED, shape, device=self.device)
                options |= {"seed": SEED} if of_project else {"uniform": uniform}
        bound = functools.partial(function, **options)
        if of_project:
            return bound

        def in_dtype_of_x(*inputs: Tensor) -> Tensor:
            return bound(*inputs).to(inputs[0].dtype)

        return compiler()(in_dtype_of_x) if competitor == "compiled" and not fixed else in_dtype_of_x

    def _check(self, competitor: str, function: Function) -> None:
        case = self.case
        if case.function == "philox_uniform" and competitor == "plain":
            assert_mean(function(), 0.5, spread=0.3 / math.sqrt(case.elements), what=self._what(competitor))
        elif competitor == "compiled" and case.draws:
            x, *parameters = self.inputs
            factors = plain.along(
                bmrs_kernels.noise_mean(*parameters, backend="torch"), x, case.activation.dim
            )
            expected = (x * factors).mean().item()
            # σ of θ is less than 3 times its mean for these posteriors.
            spread = 3.0 * expected / math.sqrt(case.draws)
            assert_mean(function(*self.inputs), expected, spread=spread, what=self._what(competitor))
        elif competitor == "plain" and case.function in PLAIN_IS_RIGHT_WITH:
            options = PLAIN_IS_RIGHT_WITH[case.function]
            inputs = posteriors(case.activation.structures, self.device, torch.float64)
            self._compare(
                competitor, inputs, self._function("plain", fixed=False, **options), TIGHT, **options
            )
        elif competitor == "compiled" and case.function in PLAIN_IS_RIGHT_WITH:
            assert function(*self.inputs).shape == case.activation.shape
        elif competitor == "compiled":
            self._compare(competitor, self.inputs, function, LOOSE)
        else:
            limits = LOOSE if competitor == "plain" else TIGHT
            self._compare(competitor, self.inputs, self._function(competitor, fixed=True), limits)

    def _compare(
        self,
        competitor: str,
        inputs: Sequence[Tensor],
        function: Function,
        limits: dict[str, float],
        **options: Any,
    ) -> None:
        """Compare outputs and gradients with those of the project's torch backend."""
        expected = self._outputs(self._function("torch", fixed=True, **options), inputs)
        for number, (found, right) in enumerate(zip(self._outputs(function, inputs), expected, strict=True)):
            what = f"{self._what(competitor)}, {'output' if number == 0 else f'gradient {number}'}"
            assert_close(found, right, limit=limits[self.case.dtype], what=what)

    def _outputs(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        out = function(*inputs)
        if self.case.directions != DIRECTIONS:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, inputs, self.grad.to(out.dtype)))

    def _what(self, competitor: str) -> str:
        return f"{self.case.name}, {competitor}"


def assert_close(found: Tensor, expected: Tensor, *, limit: float, what: str) -> None:
    """Raise AssertionError where values differ by more than a share of the largest one, or are not finite."""
    assert found.shape == expected.shape, f"{what}: of shape {found.shape}, expected {expected.shape}"
    assert found.isfinite().all(), f"{what}: not finite"
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= limit, f"{what}: differs by {error:.1e} of the largest value, allowed is {limit:.0e}"


def assert_mean(found: Tensor, expected: float, *, spread: float, what: str) -> None:
    """Raise AssertionError where values are not finite, or their mean is off by more than 6 times its spread."""
    assert found.isfinite().all(), f"{what}: not finite"
    mean = found.double().mean().item()
    assert abs(mean - expected) <= 6.0 * spread, f"{what}: mean {mean:.4g}, expected {expected:.4g}"
