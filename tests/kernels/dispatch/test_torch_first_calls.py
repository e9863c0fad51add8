"""No function of MKL's vector mathematics is called by several threads first."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bmrs_kernels.dispatch import torch_first_calls
from bmrs_kernels.evidence_change import reference as evidence_change
from bmrs_kernels.log_uniform_kl import reference as log_uniform_kl
from bmrs_kernels.multiplicative_noise import torch_noise
from bmrs_kernels.multiplicative_noise.call import NoiseCall
from bmrs_kernels.noise_moments import reference as noise_moments

# What torch hands to MKL, of contiguous tensors (aten/src/ATen/cpu/vml.h).
FAMILY = {
    *(
        "acos",
        "asin",
        "atan",
        "cos",
        "cosh",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "expm1",
        "log",
        "log10",
        "log1p",
    ),
    *("log2", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh"),
}
# As many elements a thread gets at least.
SHARED_FROM = 2048


class FirstSizes(TorchDispatchMode):
    """Notes on how many elements each function was called first."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0].rstrip("_")
        if name in FAMILY:
            self.sizes.setdefault((name, args[0].dtype), args[0].numel())
        return func(*args, **(kwargs or {}))


def posteriors():
    return torch.linspace(-30, 10, 3000).double(), torch.linspace(-8, 4, 3000).double()


def multiply(dtype):
    mu, log_sigma = (part[::30].clone() for part in posteriors())
    x = torch.ones(40, 100, dtype=dtype)
    call = NoiseCall(x, mu, log_sigma, None, torch.tensor(1), 1, "element", "tanh", -20.0, 0.0)
    noise = torch_noise.prepare(call)
    torch_noise.multiply_noise(call, noise)
    torch_noise.multiply_noise_backward(call, noise, x)


USES = {
    "KL": lambda: log_uniform_kl.kl_divergence(*posteriors(), -20.0, 0.0, with_gradients=True),
    "ΔF, log-normal": lambda: evidence_change.delta_f_lognormal(
        *posteriors(), -20.0, 1e-6, -20.0, 0.0, with_gradients=True
    ),
    "ΔF, log-uniform": lambda: evidence_change.delta_f_loguniform(
        *posteriors(), -15.0, -5.0, -20.0, 0.0, with_gradients=True
    ),
    "mean": lambda: noise_moments.noise_mean(*posteriors(), -20.0, 0.0, with_gradients=True),
    "SNR": lambda: noise_moments.noise_snr(*posteriors(), -20.0, 0.0),
    "samples": lambda: torch_noise.sample_noise(
        *posteriors(), torch.linspace(0.01, 0.99, 3000), -20.0, 0.0, with_gradients=True
    ),
    "noise in float32": lambda: multiply(torch.float32),
    "noise in float64": lambda: multiply(torch.float64),
}


@pytest.mark.parametrize("use", USES)
def test_no_function_is_called_by_several_threads_first(use):
    torch_first_calls.settle_first_calls.cache_clear()
    with FirstSizes() as first:
        USES[use]()
    assert first.sizes
    assert {key: size for key, size in first.sizes.items() if size > SHARED_FROM} == {}
