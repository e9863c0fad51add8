"""Numerically exact and fast functions of truncated log-normal multiplicative noise for PyTorch.

Everything is tensors in, tensors out; the library that prunes with it is the package ``bmrs``.
"""

from bmrs_kernels.evidence_change.op import delta_f_lognormal, delta_f_loguniform
from bmrs_kernels.log_uniform_kl.op import kl_divergence
from bmrs_kernels.multiplicative_noise.op import multiply_noise, sample_noise
from bmrs_kernels.noise_moments.op import noise_mean, noise_snr
from bmrs_kernels.uniform.op import philox_uniform
from bmrs_kernels.version import installed_version

__all__ = [
    "delta_f_lognormal",
    "delta_f_loguniform",
    "kl_divergence",
    "multiply_noise",
    "noise_mean",
    "noise_snr",
    "philox_uniform",
    "sample_noise",
]


def __getattr__(name: str) -> str:
    """Return ``__version__``, which is not read before it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return installed_version()
