"""What the function benchmarks time: every public function at the sizes of the paper's networks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from benchmarks.granularities import GRANULARITIES, distinct
from benchmarks.rivals.plain import draw_shape
from benchmarks.speed.activation_shapes import LARGE, ActivationShape
from bmrs_kernels.options import Granularity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIRECTIONS = ("forward", "backward", "both")
STRUCTURES = {"LeNet-5": 226, "MLP": 800, "ResNet-50": 26_560}

TINY_LINEAR, LENET5_MAPS = ActivationShape((128, 100)), ActivationShape((64, 18, 28, 28))
VIT_TOKENS = ActivationShape((32, 197, 768), dim=2)
RESNET50_STAGES = tuple(
    ActivationShape((32, channels, side, side))
    for channels, side in ((256, 56), (512, 28), (1024, 14), (2048, 7))
)
ACTIVATIONS = (
    ActivationShape((128, 50)),
    TINY_LINEAR,
    ActivationShape((128, 150)),
    ActivationShape((32, 6, 28, 28)),
    LENET5_MAPS,
    ActivationShape((64, 16, 10, 10)),
    *RESNET50_STAGES,
    VIT_TOKENS,
    LARGE,
)
# A check of the benchmarks runs shapes of at most the first; a CPU runs those above the second only with --large.
SMALL_ELEMENTS, LARGE_ELEMENTS = 120_000, 8_000_000

# How many tensors of the case's shape a direction has to read and write at least:
#   multiply_noise: x → out; grad, x → grad_x.
#   functions of structures: μ, log σ → value; μ, log σ, grad → grad_μ, grad_log_σ.
#   sample_noise: uniform → θ; uniform, grad → nothing of this size.
_OF_STRUCTURES = {"forward": 3, "backward": 5, "both": 8}
TENSORS_MOVED = {
    "multiply_noise": {"forward": 2, "backward": 3, "both": 5},
    "kl_divergence": _OF_STRUCTURES,
    "delta_f_lognormal": _OF_STRUCTURES,
    "delta_f_loguniform": _OF_STRUCTURES,
    "noise_mean": _OF_STRUCTURES,
    "noise_snr": {"forward": 3},
    "sample_noise": {"forward": 2, "backward": 2, "both": 4},
    "philox_uniform": {"forward": 1},
}
OF_STRUCTURES = ("kl_divergence", "delta_f_lognormal", "delta_f_loguniform", "noise_mean", "noise_snr")


@dataclass(frozen=True)
class FunctionCase:
    """A function and what it is called with.

    Attributes:
        function: name of the public function.
        activation: the shape of x, of the uniforms, or of all structures, and where the structures lie in it.
        granularity: of the noise; None for a function that has none.
        dtype: of x, or of what stands in its place.
        compiled: whether torch.compile competes: each compilation takes long.
    """

    function: str
    activation: ActivationShape
    granularity: Granularity | None = None
    dtype: str = "float32"
    compiled: bool = False

    @property
    def elements(self) -> int:
        """Number of elements of the shape."""
        return math.prod(self.activation.shape)

    @property
    def tensor_bytes(self) -> int:
        """Size of a tensor of the shape."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def large(self) -> bool:
        """Whether a CPU runs the case only with --large."""
        return self.elements > LARGE_ELEMENTS

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions that the function has."""
        return tuple(TENSORS_MOVED[self.function])

    def bytes_moved(self, direction: str) -> int:
        """Bytes that a direction reads and writes at least."""
        return TENSORS_MOVED[self.function][direction] * self.tensor_bytes

    @property
    def draws(self) -> int:
        """Number of independent values of θ; 0 for a function that draws none."""
        if self.granularity is None:
            return 0
        return math.prod(draw_shape(self.activation.shape, self.activation.dim, self.granularity))

    @property
    def name(self) -> str:
        """A name for people."""
        dtype = "" if self.dtype == "float32" else self.dtype
        return " ".join(filter(None, [self.function, self.activation.name, self.granularity, dtype]))


def cases(device: torch.device, *, large: bool, only_small: bool = False) -> list[FunctionCase]:
    """Return the cases, activations first.

    Args:
        device: a GPU gets 16-bit activations and more of torch.compile, whose compilations are quicker there.
        large: whether to include shapes of more than 8 million elements.
        only_small: whether to leave out shapes of more than 120,000 elements, and torch.compile.
    """
    on_gpu = device.type == "cuda"
    found = [*_multiplied(on_gpu), *_drawn(), *_of_structures(on_gpu)]
    if only_small:
        return [replace(case, compiled=False) for case in found if case.elements <= SMALL_ELEMENTS]
    return [case for case in found if large or not case.large]


def _multiplied(on_gpu: bool) -> list[FunctionCase]:
    compiled: set[tuple[ActivationShape, Granularity]] = {(TINY_LINEAR, "element"), (LENET5_MAPS, "element")}
    if on_gpu:
        compiled |= {(each, "element") for each in (*RESNET50_STAGES, VIT_TOKENS)}
        compiled |= {(LARGE, granularity) for granularity in GRANULARITIES}
    return [
        FunctionCase("multiply_noise", activation, granularity, dtype, (activation, granularity) in compiled)
        for activation in ACTIVATIONS
        for dtype in DTYPES
        if dtype == "float32" or (on_gpu and activation in (VIT_TOKENS, LARGE))
        for granularity in distinct(GRANULARITIES, of_matrices=len(activation.shape) == 2)
    ]


def _drawn() -> list[FunctionCase]:
    return [
        FunctionCase(function, activation)
        for function in ("sample_noise", "philox_uniform")
        for activation in (TINY_LINEAR, LENET5_MAPS, VIT_TOKENS, LARGE)
    ]


def _of_structures(on_gpu: bool) -> list[FunctionCase]:
    compiled = {("kl_divergence", STRUCTURES["MLP"])}
    if on_gpu:
        compiled |= {(function, STRUCTURES["ResNet-50"]) for function in OF_STRUCTURES}
    return [
        FunctionCase(function, ActivationShape((count,), dim=0), compiled=(function, count) in compiled)
        for function in OF_STRUCTURES
        for count in STRUCTURES.values()
    ]
