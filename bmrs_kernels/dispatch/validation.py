"""Checks of arguments, shared by every public function and every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_parameters(mu: Tensor, log_sigma: Tensor) -> None:
    """Raise unless μ and log σ are floating-point tensors of one shape, dtype and device."""
    for name, value in (("mu", mu), ("log_sigma", log_sigma)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if mu.shape != log_sigma.shape:
        raise ValueError(
            f"mu and log_sigma must have one shape, got {tuple(mu.shape)} and {tuple(log_sigma.shape)}"
        )
    if mu.dtype != log_sigma.dtype:
        raise TypeError(f"mu and log_sigma must have one dtype, got {mu.dtype} and {log_sigma.dtype}")
    check_device("log_sigma", log_sigma, "mu", mu)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors are on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {value.device}")


def check_interval(lower: float, upper: float) -> None:
    """Raise unless lower < upper and both are finite."""
    # Comparisons and not math.isfinite, which torch.compile cannot trace for numbers that vary.
    if not -math.inf < lower < upper < math.inf:
        raise ValueError(f"lower must be less than upper and both finite, got lower={lower}, upper={upper}")


def check_reduced_interval(reduced_lower: float, reduced_upper: float, lower: float, upper: float) -> None:
    """Raise unless the reduced prior's interval is a proper interval inside [lower, upper]."""
    if not lower <= reduced_lower < reduced_upper <= upper:
        raise ValueError(
            "reduced_lower and reduced_upper must satisfy lower <= reduced_lower < reduced_upper <= upper, got "
            f"reduced_lower={reduced_lower}, reduced_upper={reduced_upper}, lower={lower}, upper={upper}"
        )


def check_reduced_normal(prior_mean: float, prior_std: float) -> None:
    """Raise unless the reduced prior's mean is finite and its standard deviation positive and finite."""
    if not -math.inf < prior_mean < math.inf:
        raise ValueError(f"prior_mean must be finite, got {prior_mean}")
    if not 0 < prior_std < math.inf:
        raise ValueError(f"prior_std must be positive and finite, got {prior_std}")


def check_uniform(uniform: Tensor, mu: Tensor) -> None:
    """Raise unless the uniforms are floating-point, on μ's device and broadcast with μ."""
    if not isinstance(uniform, Tensor):
        raise TypeError(f"uniform must be a tensor, got {type(uniform).__name__}")
    if not uniform.dtype.is_floating_point:
        raise TypeError(f"uniform must have a floating-point dtype, got {uniform.dtype}")
    check_device("uniform", uniform, "mu", mu)
    try:
        torch.broadcast_shapes(uniform.shape, mu.shape)
    except RuntimeError:
        raise ValueError(
            f"uniform of shape {tuple(uniform.shape)} does not broadcast with mu of shape {tuple(mu.shape)}"
        ) from None


def seed_tensor(seed: Tensor | int, device: torch.device) -> Tensor:
    """Return a seed as an int64 scalar tensor on a device.

    Raises:
        TypeError: ``seed`` is neither an int nor an int64 tensor.
        ValueError: ``seed`` has more than one element, more than 64 bits, or is on another device.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got a tensor of {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on the device of the noise ({device}), got {seed.device}")
        return seed.reshape(())
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
