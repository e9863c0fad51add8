"""The authors' noise layers by their names, arguments and attributes, computed by `bmrs_kernels`."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

import bmrs_kernels
from bmrs.checks import check_choice, check_integer, check_number, shown
from bmrs.noise.layer import INITIAL_LOG_SIGMA, INITIAL_MU
from bmrs.noise.seeds import seed_of
from bmrs_kernels.constants import HALF_LOG_2PI, LN2, LOWER, PRIOR_STD, REDUCED_LOWER, UPPER

Averaging: TypeAlias = Literal["sum", "mean"]
Convention: TypeAlias = Literal["authors", "paper"]

PER_ELEMENT = -1
"""The ``axis`` with which every element of an example has a noise variable of its own."""

_DEFAULT_BITS = 8.0
# How far below 1 averaging ones may round; what one averaged state prunes is further below.
_ROUNDING = 1e-5
# Of the authors' checkpoints: bounds of the uniforms, which are always 0 and 1 here.
_BOUNDS = {"umin": 0.0, "umax": 1.0}


class PruningLayer(nn.Module):
    """Base of the five layers: multiplies each structure by a truncated log-normal noise variable θ.

    In training mode θ is drawn at every element of x, in evaluation mode it is E[θ]; masked structures are 0 in both.

    Args:
        d: sizes of one example, without the batch dimension; an int for a vector.
        a: lower bound of log θ, in nats.
        b: upper bound of log θ, in nats.
        n_samples: draws of θ in a forward pass; 1 is what there is.
        eps: kept as an attribute; nothing is clamped, as the kernels are exact in the tails.
        kl_averaging: ``"sum"`` or ``"mean"``, what `kl` does unless told otherwise.
        thresh: what `compress` compares with; the class says how, and has a default.
        enabled: False lets x through and adds no KL.
        axis: dimension of d along which the structures lie, counted without the batch dimension; -1 gives every
            element of d a structure of its own.

    Attributes:
        mu: parameter, of the shape d with 1 in place of all sizes but that of ``axis``; float32 or float64.
        logsigma: parameter of that shape.
        mask: floating buffer of that shape, 0 for what is pruned, else 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    mu: nn.Parameter
    logsigma: nn.Parameter
    mask: Tensor

    needs_upgrade: ClassVar[bool] = True
    """Tells functions of the library that look for noise layers that they would miss this one."""
    default_thresh: ClassVar[float]
    prunes_high_scores: ClassVar[bool] = False

    def __init__(
        self,
        d: Sequence[int] | int,
        a: float = LOWER,
        b: float = UPPER,
        n_samples: int = 1,
        eps: float = 1e-5,
        kl_averaging: Averaging = "sum",
        thresh: float | None = None,
        enabled: bool = True,
        axis: int = PER_ELEMENT,
    ) -> None:
        super().__init__()
        sizes = _sizes(d)
        check_number("a", a)
        check_number("b", b)
        if not a < b:
            raise ValueError(f"a must be less than b, got {a} and {b}")
        if n_samples != 1:
            raise ValueError(
                f"n_samples must be 1, got {shown(n_samples)}: for more draws call the network several times"
            )
        check_choice("kl_averaging", kl_averaging, get_args(Averaging))
        thresh = self.default_thresh if thresh is None else thresh
        check_number("thresh", thresh)
        check_integer("axis", axis)
        if not PER_ELEMENT <= axis < len(sizes):
            raise ValueError(
                f"axis must be -1 for a structure at every element or less than the {len(sizes)} dimensions of "
                f"d={list(sizes)}, got {axis}"
            )
        self.d = sizes
        self.a, self.b = float(a), float(b)
        self.n_samples = n_samples
        self.eps = eps
        self.kl_averaging: Averaging = kl_averaging
        self.thresh = thresh
        self.enabled = enabled
        self.axis = axis
        shape = [size if axis in (PER_ELEMENT, i) else 1 for i, size in enumerate(sizes)]
        dtype = _at_least_float32(torch.get_default_dtype())
        self.mu = nn.Parameter(torch.full(shape, INITIAL_MU, dtype=dtype))
        self.logsigma = nn.Parameter(torch.full(shape, INITIAL_LOG_SIGMA, dtype=dtype))
        self.register_buffer("mask", torch.ones(shape, dtype=dtype))

    @property
    def kept(self) -> Tensor:
        """Bool of the shape of ``mask``; of averaged masks, what none of the averaged states prunes."""
        return self.mask >= 1 - _ROUNDING

    def kl(self, averaging: Averaging | None = None) -> Tensor:
        """Return KL(posterior‖prior) in nats, a scalar: the sum or mean over structures.

        Pruned structures add 0, and count in the mean; a layer that is not enabled has 0.

        Args:
            averaging: ``"sum"`` or ``"mean"``; the layer's ``kl_averaging`` if None.
        """
        averaging = self.kl_averaging if averaging is None else averaging
        check_choice("averaging", averaging, get_args(Averaging))
        if not self.enabled:
            return self.mu.new_zeros(())
        divergence = self._posterior(bmrs_kernels.kl_divergence).where(self.kept, 0.0)
        return divergence.sum() if averaging == "sum" else divergence.mean()

    def SNR(self) -> Tensor:
        """Return E[θ]/sd(θ) of every structure, in the shape of ``mu``."""
        return self._posterior(bmrs_kernels.noise_snr)

    def Etheta(self) -> Tensor:
        """Return E[θ] of every structure, pruned or not, in the shape of ``mu``."""
        return self._posterior(bmrs_kernels.noise_mean)

    @torch.no_grad()
    def compress(
        self,
        set_mask: bool = True,
        thresh: float | None = None,
        sigma_p_tilde: float | None = None,
        mu_p_tilde: float | None = None,
        l2_norm: Tensor | None = None,
    ) -> Tensor:
        """Decide which structures stay, all of them anew, and return that as a mask of 0 and 1.

        Each class uses the arguments that its rule has. A layer that is not enabled keeps its mask. If the rule asks
        for all structures, the best one stays, and a warning says so.

        Args:
            set_mask: whether the result becomes ``mask``.
            thresh: what scores are compared with; the layer's ``thresh`` if None.
            sigma_p_tilde: standard deviation of BMRS_N's spike.
            mu_p_tilde: mean of BMRS_N's spike, in nats; BMRS_U: bits below which θ rounds to 0.
            l2_norm: of the weights that make the structures, one for each.

        Raises:
            ValueError: μ, log σ or a score is NaN or infinite, or an argument does not suit.
        """
        if not self.enabled:
            return self.mask.clone()
        mask = self.decided(thresh, sigma_p_tilde, mu_p_tilde, l2_norm)
        if set_mask:
            self.mask.copy_(mask)
        return mask

    def decided(
        self,
        thresh: float | None,
        sigma_p_tilde: float | None,
        mu_p_tilde: float | None,
        l2_norm: Tensor | None,
        *,
        name: str = "",
    ) -> Tensor:
        """Return what `compress` does of an enabled layer; its errors and warnings call the layer by a name."""
        called = f"pruning layer {name!r}" if name else f"{type(self).__name__}(d={list(self.d)})"
        thresh = self.thresh if thresh is None else thresh
        check_number("thresh", thresh)
        for quantity, values in (("mu", self.mu), ("logsigma", self.logsigma)):
            if broken := int((~values.isfinite()).sum()):
                raise ValueError(
                    f"{quantity} is NaN or infinite in {broken} of {values.numel()} structures of {called}; "
                    "nothing was pruned"
                )
        try:
            scores = self._scores(sigma_p_tilde, mu_p_tilde, l2_norm)
        except ValueError as error:
            raise ValueError(f"{error} ({called})") from error
        if broken := int(scores.isnan().sum()):
            raise ValueError(f"{broken} of {scores.numel()} scores of {called} are NaN; nothing was pruned")
        keep = scores < thresh if self.prunes_high_scores else scores > thresh
        if not keep.any():
            best = scores.argmin() if self.prunes_high_scores else scores.argmax()
            keep.view(-1)[best] = True
            warnings.warn(
                f"thresh={thresh:g} asked for every structure of {called}; the best one was kept",
                stacklevel=4,
            )
        return keep.to(self.mask.dtype)

    @abstractmethod
    def _scores(
        self, sigma_p_tilde: float | None, mu_p_tilde: float | None, l2_norm: Tensor | None
    ) -> Tensor:
        """Return what the class compares with its threshold, in the shape of ``mu``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the noise, in the shape and dtype of x.

        Args:
            x: of shape (N, *d); with an ``axis`` only the size along it counts.

        Raises:
            TypeError: x is not a floating tensor.
            ValueError: x has another shape.
        """
        if not self.enabled:
            return x
        self._check_input(x)
        if not self.training:
            # mu's shape broadcasts from the right.
            return x * self.Etheta().where(self.kept, 0.0).to(x.dtype)
        per_element = self.axis == PER_ELEMENT
        product = bmrs_kernels.multiply_noise(
            x.flatten(1) if per_element else x,
            self.mu.flatten(),
            self.logsigma.flatten(),
            dim=1 if per_element else self.axis + 1,
            mask=self.kept.flatten(),
            granularity="element",
            seed=seed_of(x, generator=None, same_on_all_ranks=False),
            lower=self.a,
            upper=self.b,
        )
        return product.view(x.shape) if per_element else product

    def extra_repr(self) -> str:
        """Return the arguments that matter most, as ``print(model)`` shows them."""
        text = f"d={list(self.d)}, axis={self.axis}, a={self.a:g}, b={self.b:g}, thresh={self.thresh:g}"
        return text if self.enabled else f"{text}, enabled=False"

    def _posterior(self, function: Callable[..., Tensor]) -> Tensor:
        return function(self.mu, self.logsigma, lower=self.a, upper=self.b)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating tensor for {type(self).__name__}, got {got}")
        fits = x.dim() == len(self.d) + 1
        if fits and self.axis == PER_ELEMENT:
            fits = x.shape[1:] == self.d
        elif fits:
            fits = x.shape[self.axis + 1] == self.d[self.axis]
        if not fits:
            raise ValueError(
                f"x must have shape (N, {', '.join(map(str, self.d))}) for {type(self).__name__} with "
                f"d={list(self.d)}, axis={self.axis}, got {tuple(x.shape)}"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in _BOUNDS.items():
            destination[prefix + name] = self.mu.detach().new_full((1,), value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in _BOUNDS:
            state_dict.pop(prefix + name, None)
        for name in ("mu", "logsigma", "mask"):
            if isinstance(value := state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = value.to(_at_least_float32(value.dtype))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PruningLayer:
        """Follow conversions, but stay at 32 bits or more: fewer do not resolve the posterior."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            dtype = _at_least_float32(converted.dtype)
            return converted if converted.dtype == dtype else tensor.to(converted.device, dtype)

        super()._apply(convert, recurse)
        return self


class LogUniformPruningLayer(PruningLayer):
    """Keeps structures whose signal-to-noise ratio E[θ]/sd(θ) is greater than ``thresh``, 1 by default."""

    default_thresh: ClassVar[float] = 1.0

    def _scores(
        self, sigma_p_tilde: float | None, mu_p_tilde: float | None, l2_norm: Tensor | None
    ) -> Tensor:
        return self.SNR()


class LogUniformL2NormPruningLayer(PruningLayer):
    """Keeps structures whose weights have an L2 norm greater than ``thresh``, or whose E[θ] is, without norms.

    ``thresh`` is 0.1 by default.
    """

    default_thresh: ClassVar[float] = 0.1

    def _scores(
        self, sigma_p_tilde: float | None, mu_p_tilde: float | None, l2_norm: Tensor | None
    ) -> Tensor:
        if l2_norm is None:
            return self.Etheta()
        if not isinstance(l2_norm, Tensor) or l2_norm.numel() != self.mu.numel():
            got = tuple(l2_norm.shape) if isinstance(l2_norm, Tensor) else shown(l2_norm)
            raise ValueError(
                f"l2_norm must be a tensor with a norm for each of the {self.mu.numel()} structures, got {got}"
            )
        return l2_norm.detach().to(self.mu.device).reshape(self.mu.shape)


class _EvidenceLayer(PruningLayer):
    """Keeps structures whose ΔF is less than ``thresh``, 0 by default."""

    default_thresh: ClassVar[float] = 0.0
    prunes_high_scores: ClassVar[bool] = True

    def __init__(self, *arguments: Any, convention: Convention = "authors", **options: Any) -> None:
        super().__init__(*arguments, **options)
        check_choice("convention", convention, get_args(Convention))
        self.convention: Convention = convention

    @abstractmethod
    def bmr(self, sigma_p_tilde: float | None = None, mu_p_tilde: float | None = None) -> Tensor:
        """Return ΔF of every structure in nats, float64 of the shape of ``mu``."""

    def _scores(
        self, sigma_p_tilde: float | None, mu_p_tilde: float | None, l2_norm: Tensor | None
    ) -> Tensor:
        return self.bmr(sigma_p_tilde, mu_p_tilde)

    def extra_repr(self) -> str:
        """Return the arguments that matter most, as ``print(model)`` shows them."""
        return f"{super().extra_repr()}, convention={self.convention!r}"


class LogUniformCDFBMRPruningLayer(_EvidenceLayer):
    """BMRS_U: keeps structures whose ΔF under a log-uniform reduced prior is less than ``thresh``, 0 by default.

    Args:
        *arguments: those of `PruningLayer`, in its order or by name.
        convention: ``"authors"`` moves μ into [a, b] before ΔF is computed; ``"paper"`` takes it as it is.
    """

    def bmr(self, sigma_p_tilde: float | None = None, mu_p_tilde: float | None = None) -> Tensor:
        """Return ΔF of every structure in nats, float64 of the shape of ``mu``.

        Args:
            sigma_p_tilde: not used; BMRS_N has it.
            mu_p_tilde: bits p1: the reduced prior ends at θ = 2^-p1. 8 if None.

        Raises:
            ValueError: the reduced prior, [-23 ln 2, -p1 ln 2], is empty or not within [a, b].
        """
        return _delta_f_loguniform(self, self.convention, mu_p_tilde)


class LogUniformApproximateDiracBMRPruningLayer(_EvidenceLayer):
    """BMRS_N: keeps structures whose ΔF under a spike as reduced prior is less than ``thresh``, 0 by default.

    Args:
        *arguments: those of `PruningLayer`, in its order or by name.
        pruning_eps: standard deviation of the spike on log θ; 1e-6 if None.
        convention: ``"authors"`` leaves the 2π out of Eq. 8, so that ΔF is ½ log 2π higher; ``"paper"`` has it.
    """

    def __init__(
        self,
        d: Sequence[int] | int,
        a: float = LOWER,
        b: float = UPPER,
        n_samples: int = 1,
        eps: float = 1e-5,
        kl_averaging: Averaging = "sum",
        thresh: float | None = None,
        enabled: bool = True,
        axis: int = PER_ELEMENT,
        pruning_eps: float | None = None,
        *,
        convention: Convention = "authors",
    ) -> None:
        super().__init__(d, a, b, n_samples, eps, kl_averaging, thresh, enabled, axis, convention=convention)
        self.pruning_eps = PRIOR_STD if pruning_eps is None else pruning_eps
        check_number("pruning_eps", self.pruning_eps, above=0.0)

    def bmr(self, sigma_p_tilde: float | None = None, mu_p_tilde: float | None = None) -> Tensor:
        """Return ΔF of every structure in nats, float64 of the shape of ``mu``.

        Args:
            sigma_p_tilde: standard deviation of the spike on log θ; ``pruning_eps`` if None.
            mu_p_tilde: its mean, in nats within [a, b]; a if None.

        Raises:
            ValueError: ``sigma_p_tilde`` is not positive, or ``mu_p_tilde`` outside [a, b], as bits are.
        """
        mean = self.a if mu_p_tilde is None else mu_p_tilde
        std = self.pruning_eps if sigma_p_tilde is None else sigma_p_tilde
        check_number("sigma_p_tilde", std, above=0.0)
        check_number("mu_p_tilde", mean)
        if not self.a <= mean <= self.b:
            raise ValueError(
                f"mu_p_tilde of BMRS_N is the mean of the spike on log θ, in [{self.a:g}, {self.b:g}], "
                f"got {mean:g}: bits are for LogUniformCDFBMRPruningLayer; leave it out for a"
            )
        delta_f = bmrs_kernels.delta_f_lognormal(
            self.mu.double(),
            self.logsigma.double(),
            prior_mean=mean,
            prior_std=std,
            lower=self.a,
            upper=self.b,
        )
        return delta_f + HALF_LOG_2PI if self.convention == "authors" else delta_f

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "pruning_eps"] = torch.tensor(
            [self.pruning_eps], dtype=torch.float64, device=self.mu.device
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        std = state_dict.pop(prefix + "pruning_eps", None)
        if std is not None:
            number = torch.as_tensor(std)
            value = float(number.item()) if number.numel() == 1 else math.nan
            if 0.0 < value < math.inf:
                self.pruning_eps = value
            else:
                errors: list[str] = rest[-1]
                errors.append(f"{prefix}pruning_eps must be one positive number, got {shown(std)}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class LogUniformAllBMRPruningLayer(LogUniformApproximateDiracBMRPruningLayer):
    """All scores of one posterior: decides as BMRS_N, and has BMRS_U's ΔF, SNR and E[θ] beside it.

    Args:
        *arguments: those of `LogUniformApproximateDiracBMRPruningLayer`.
    """

    def bmr_approximate(self, sigma_p_tilde: float | None = None, mu_p_tilde: float | None = None) -> Tensor:
        """Return BMRS_N's ΔF of every structure, as `bmr` does."""
        return self.bmr(sigma_p_tilde, mu_p_tilde)

    def bmr_cdf(self, mu_p_tilde: float | None = None) -> Tensor:
        """Return BMRS_U's ΔF of every structure, as `LogUniformCDFBMRPruningLayer.bmr` does."""
        return _delta_f_loguniform(self, self.convention, mu_p_tilde)


def _delta_f_loguniform(layer: PruningLayer, convention: Convention, bits: float | None) -> Tensor:
    bits = _DEFAULT_BITS if bits is None else bits
    check_number("mu_p_tilde", bits)
    end = -bits * LN2
    if not layer.a <= REDUCED_LOWER < end <= layer.b:
        raise ValueError(
            f"mu_p_tilde of BMRS_U is a number of bits p1 for which [-23 ln 2, -p1 ln 2] is not empty and lies within "
            f"[{layer.a:g}, {layer.b:g}], got {bits:g}"
        )
    mu = layer.mu.double()
    return bmrs_kernels.delta_f_loguniform(
        mu.clamp(layer.a, layer.b) if convention == "authors" else mu,
        layer.logsigma.double(),
        reduced_upper=end,
        lower=layer.a,
        upper=layer.b,
    )


def _sizes(d: Sequence[int] | int) -> tuple[int, ...]:
    sizes = (d,) if isinstance(d, int) else d
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise TypeError(f"d must be the sizes of an example, such as [6, 28, 28], got {shown(d)}")
    for size in sizes:
        check_integer("d", size, minimum=1)
    return tuple(sizes)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
