"""The noise layer: multiplicative truncated log-normal noise on the structures of its input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

import bmrs_kernels
from bmrs.checks import check_choice, check_integer, check_number
from bmrs.noise.activations import activated
from bmrs.noise.nested import for_each_example
from bmrs.noise.seeds import seed_of
from bmrs.noise.transformers_loading import initialise_what_was_not_loaded
from bmrs.noise.wrappers import has_no_values, is_sharded, laid_out_like, whole
from bmrs_kernels.constants import LOWER, UPPER
from bmrs_kernels.options import Activation, Backend, Granularity

if TYPE_CHECKING:
    from typing_extensions import TypeIs

NoisePosition: TypeAlias = Literal["output", "input", "hidden"]
"""What of a layer noise multiplies: what it returns, what it takes, or the hidden units of a recurrent one."""

INITIAL_MU, INITIAL_LOG_SIGMA = 0.0, -5.0
"""Where posteriors start: θ near 1, with a standard deviation below 1 %."""

# How far below 1 rounding can take an average of ones; a structure that one of 10,000 states lacks is further below.
_ROUNDING_OF_AVERAGES = 1e-5


class NoiseLayer(nn.Module):
    """Multiplies each structure of its input by a learned noise variable θ in [e^lower, e^upper].

    log θ has a uniform prior on [lower, upper] and, as posterior, Normal(mu, exp(log_sigma)²) truncated to
    that interval (arXiv 1705.07283). In training mode the layer returns ``activation(x) · θ · mask`` with
    fresh θ; in evaluation mode ``activation(x) · E[θ] · mask``.

    Args:
        num_structures: number of structures (neurons, filters, channels, attention heads).
        dim: dimension of x along which the structures lie; may be negative.
        structure_size: successive entries along ``dim`` that a structure takes, such as the width of an attention
            head; x has ``num_structures · structure_size`` of them.
        granularity: ``"element"`` draws θ at every element of x, ``"sample"`` once per example and structure
            (Eq. 1 of arXiv 2406.01345), ``"batch"`` once per structure and minibatch.
        activation: ``"relu"`` or ``"tanh"``, applied to x before the noise in the same pass; None for none.
        lower: lower bound of log θ, in nats.
        upper: upper bound of log θ, in nats.
        initial_mu: value that ``mu`` starts from.
        initial_log_sigma: value that ``log_sigma`` starts from.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"numba"``; see ``bmrs_kernels``.
        same_on_all_ranks: whether processes of torch.distributed that have seeded torch alike draw the same noise.
            False, as suits data parallelism, makes their draws independent; rank 0 draws what a single process does.
        generator: what the noise is drawn from; torch's own generator of x's device if None. It belongs to no state.
        device: device of the parameters and the mask.
        dtype: dtype of the parameters; 16-bit dtypes give float32 ones.

    Attributes:
        mu: parameter of shape (num_structures,), float32 or float64. ``half()`` and ``bfloat16()`` leave it
            float32: 16 bits do not resolve the posterior.
        log_sigma: parameter of the same shape and dtype.
        mask: bool buffer of shape (num_structures,); False marks a pruned structure. To bring one back, `set_kept`.
        pruned: bool buffer, the complement of ``mask``. Averages over buffers, as weight averaging makes them, give
            True for a bool that was True in any state: they lose what ``mask`` prunes, but not what ``pruned`` does.
            A structure that either of them prunes is pruned.
    """

    mu: nn.Parameter
    log_sigma: nn.Parameter
    mask: Tensor
    pruned: Tensor

    # Of layers that were pickled before there was a choice.
    same_on_all_ranks: bool = False
    generator: torch.Generator | None = None
    compacted: bool = False
    """Whether `compact` left it in the network that it made."""
    place: str = ""
    """Name that the layer had whose noise `add_noise` made this, for errors."""
    _born_without_values: bool = False
    was_looked_at_for_decay: bool = False
    had_gradients: bool = False
    was_found_quiet: bool = False
    has_drawn: bool = False
    """Whether it has drawn noise, as far as was to be seen: not where torch compiled it."""
    losses_without_draw: int = 0
    added: Any = None
    """Where `add_noise` put it, an `Added`; None for a layer of the user's own."""
    recompute: bool = False
    """Whether `add_noise` was told that the layer in front computes again in backward what this one multiplies."""
    hooked: NoisePosition | None = None
    """What of its layer hooks multiply with the noise, if `add_noise` put it there; else None."""

    def __init__(
        self,
        num_structures: int,
        *,
        dim: int = 1,
        structure_size: int = 1,
        granularity: Granularity = "element",
        activation: Activation | None = None,
        lower: float = LOWER,
        upper: float = UPPER,
        initial_mu: float = INITIAL_MU,
        initial_log_sigma: float = INITIAL_LOG_SIGMA,
        backend: Backend = "auto",
        same_on_all_ranks: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_structures", num_structures, minimum=1)
        check_integer("dim", dim)
        check_integer("structure_size", structure_size, minimum=1)
        check_choice("granularity", granularity, get_args(Granularity))
        check_choice("activation", activation, (None, *get_args(Activation)))
        check_choice("backend", backend, get_args(Backend))
        numbers = {
            "lower": lower,
            "upper": upper,
            "initial_mu": initial_mu,
            "initial_log_sigma": initial_log_sigma,
        }
        for name, value in numbers.items():
            check_number(name, value)
        if lower >= upper:
            raise ValueError(f"lower must be less than upper, got {lower} and {upper}")
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype, got {dtype}")

        self.num_structures = num_structures
        self.dim = dim
        self.structure_size = structure_size
        self.granularity: Granularity = granularity
        self.activation: Activation | None = activation
        self.lower = lower
        self.upper = upper
        self.initial_mu = initial_mu
        self.initial_log_sigma = initial_log_sigma
        self.backend: Backend = backend
        self.same_on_all_ranks = same_on_all_ranks
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
        self.generator = generator
        dtype = _at_least_float32(dtype)
        self.mu = nn.Parameter(torch.empty(num_structures, device=device, dtype=dtype))
        self.log_sigma = nn.Parameter(torch.empty(num_structures, device=device, dtype=dtype))
        self.register_buffer("mask", torch.empty(num_structures, device=device, dtype=torch.bool))
        self.register_buffer("pruned", torch.empty(num_structures, device=device, dtype=torch.bool))
        self.reset_parameters()
        self._born_without_values = self.mu.is_meta

    def reset_parameters(self) -> None:
        """Set ``mu`` and ``log_sigma`` to their initial values and keep every structure."""
        with torch.no_grad():
            self.mu.fill_(self.initial_mu)
            self.log_sigma.fill_(self.initial_log_sigma)
            self.mask.fill_(True)
            self.pruned.fill_(False)

    @property
    def kept(self) -> Tensor:
        """What is not pruned, bool of shape (num_structures,): ``mask``, unless that was averaged."""
        return self.mask > self.pruned

    @torch.no_grad()
    def set_kept(self, kept: Tensor) -> None:
        """Keep these structures, bool of shape (num_structures,), and no others; pruned ones can come back so.

        Raises:
            TypeError: they are not bool, as indices are not.
            ValueError: they are not as many as there are structures.
        """
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
            raise TypeError(
                f"kept must be a bool tensor of shape ({self.num_structures},), got {got}; of indices, "
                "torch.zeros_like(layer.mask).index_fill(0, indices, True) makes one"
            )
        if kept.shape != self.mask.shape:
            raise ValueError(
                f"kept must have shape ({self.num_structures},), one entry for each structure, got {tuple(kept.shape)}"
            )
        self.mask.copy_(laid_out_like(kept, self.mask))
        self.pruned.copy_(~self.mask)

    def settle(self, name: str = "") -> None:
        """Make ``mask`` and ``pruned`` agree on what is kept, after averaging or after ``mask`` was written by hand.

        Warns where ``mask`` alone would have kept a pruned structure; ``name`` is the layer's in that warning.
        """
        # Nothing is written where nothing changes: others may read these tensors, or forbid writing.
        if has_no_values(self.mask) or bool(whole(self.mask ^ self.pruned).all()):
            return
        if count := int(whole(self.mask & self.pruned).sum()):
            warnings.warn(
                f"noise layer {name!r}: {count} structures that are pruned came back in its mask, as averages over "
                "buffers make them; they stay pruned. To bring structures back, call the layer's set_kept",
                stacklevel=3,
            )
        self.set_kept(self.kept)

    def expected_noise(self) -> Tensor:
        """Return E[θ] · kept of shape (num_structures,), the factors of evaluation mode."""
        mean = bmrs_kernels.noise_mean(
            self.mu, self.log_sigma, lower=self.lower, upper=self.upper, backend=self.backend
        )
        return mean * self.kept

    def spread(self, values: Tensor) -> Tensor:
        """Return values of the structures, of shape (num_structures,), for the entries along ``dim``."""
        return values if self.structure_size == 1 else values.repeat_interleave(self.structure_size)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x by the noise, or in evaluation mode by its expectation.

        Args:
            x: floating tensor of at least one dimension, with ``num_structures · structure_size`` entries along
                ``dim``; nested tensors too.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: x is not a floating tensor, ``mu`` was narrowed to 16 bits, or one of the two is a DTensor alone.
            ValueError: x lacks dimension ``dim``, has another size along it, or lies on another device.
        """
        if isinstance(x, Tensor) and x.is_nested:
            return for_each_example(self, x)
        if not self.training:
            self._check_input(x)
            shape = [1] * x.dim()
            shape[self.dim] = -1
            factors = self.spread(self.expected_noise()).to(x.dtype).view(shape)
            return activated(x, self.activation) * factors
        try:
            if self.mu.dtype.itemsize < 4:
                raise TypeError("mu is too narrow")  # `_check_input` says more
            return self._noisy(x)
        except Exception as error:
            failure = error
        # The kernels have checked x; only what they refuse is looked at once more, to say it in the layer's words.
        self._check_input(x)
        raise failure

    def _noisy(self, x: Tensor) -> Tensor:
        if self.structure_size == 1:
            return self._multiply(x, self.dim)
        if x.shape[self.dim] != self.num_structures * self.structure_size:
            raise ValueError("x cannot be divided into structures")  # `forward` says more
        dim = self.dim % x.dim()
        x = x.unflatten(dim, (self.num_structures, self.structure_size))
        return self._multiply(x, dim).flatten(dim, dim + 1)

    def _multiply(self, x: Tensor, dim: int) -> Tensor:
        if not torch.compiler.is_compiling() and not self.has_drawn:
            self.has_drawn = True
        return bmrs_kernels.multiply_noise(
            x,
            self.mu,
            self.log_sigma,
            dim=dim,
            mask=self.kept,
            granularity=self.granularity,
            activation=self.activation,
            seed=seed_of(x, generator=self.generator, same_on_all_ranks=self.same_on_all_ranks),
            lower=self.lower,
            upper=self.upper,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the constructor arguments, as ``print(model)`` shows them."""
        size = "" if self.structure_size == 1 else f", structure_size={self.structure_size}"
        text = f"{self.num_structures}, dim={self.dim}{size}, granularity={self.granularity!r}"
        text += f", activation={self.activation!r}, lower={self.lower}, upper={self.upper}"
        text += ", same_on_all_ranks=True" if self.same_on_all_ranks else ""
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"

    def _check_input(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless the layer can take x."""
        if self.mu.dtype.itemsize < 4:
            raise TypeError(
                f"mu and log_sigma must have 32 bits or more, got {self.mu.dtype}, as FSDP's mixed precision makes "
                "them: shard the noise layers by themselves first, without a policy, fully_shard([layer for layer in "
                "model.modules() if isinstance(layer, bmrs.NoiseLayer)])"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must have a floating dtype, got {x.dtype}")
        if not -x.dim() <= self.dim < x.dim():
            raise ValueError(
                f"x must have a dimension {self.dim}, got shape {tuple(x.shape)}{self._in_words()}"
            )
        if x.shape[self.dim] != self.num_structures * self.structure_size:
            size = "" if self.structure_size == 1 else f" · structure_size={self.structure_size}"
            raise ValueError(
                f"x must have num_structures={self.num_structures}{size} entries along dim={self.dim}, "
                f"got shape {tuple(x.shape)}{self._in_words()}"
            )
        if is_sharded(x) != is_sharded(self.mu):
            sharded, plain = ("x", "the noise layer") if is_sharded(x) else ("the noise layer", "x")
            raise TypeError(
                f"{sharded} is a DTensor and {plain} is not: call add_noise after parallelize_module, or distribute "
                "the noise layer itself with torch.distributed.tensor.distribute_module"
            )
        if x.device != self.mu.device:
            raise ValueError(f"x must be on the noise layer's device {self.mu.device}, got {x.device}")

    def _in_words(self) -> str:
        return f", at layer {self.place!r}: tell add_noise its num_structures and dim" if self.place else ""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load a state, but keep the parameters at 32 bits or more and the mask bool, also with ``assign=True``.

        In averages of states a structure is pruned that is pruned in any of them.
        """
        values = {name: state_dict.get(prefix + name) for name in ("mu", "log_sigma", "mask", "pruned")}
        # Bools add up to True, not to 2: the half of such a sum tells only in `pruned` what was kept in all states.
        lowest = _ROUNDING_OF_AVERAGES if _is_averaged(values["pruned"]) else 1 - _ROUNDING_OF_AVERAGES
        borders = {"mask": lowest, "pruned": _ROUNDING_OF_AVERAGES}
        for name, value in values.items():
            if name in borders and _is_averaged(value):
                # In double precision: in 16 bits the border itself would round to 1, and all be pruned.
                state_dict[prefix + name] = value.double() > borders[name]
            elif name not in borders and isinstance(value, Tensor):
                state_dict[prefix + name] = value.to(_at_least_float32(value.dtype))
        mask, pruned = (state_dict.get(prefix + name) for name in ("mask", "pruned"))
        if isinstance(mask, Tensor):
            if isinstance(pruned, Tensor) and pruned.shape == mask.shape:
                state_dict[prefix + "mask"] = mask = mask > pruned.to(mask.device)
            # States of earlier versions have the mask alone.
            state_dict[prefix + "pruned"] = ~mask
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self.settle(arguments[1].rstrip("."))  # averages are saved as what they act as
        super()._save_to_state_dict(*arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "pruned" not in self._buffers:  # pickled by an earlier version
            self.register_buffer("pruned", ~self.mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseLayer:
        """Follow conversions, but keep the mask bool and the parameters at 32 bits or more."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            dtype = torch.bool if tensor.dtype == torch.bool else _at_least_float32(converted.dtype)
            # From the unconverted tensor, which still has all its digits.
            return converted if converted.dtype == dtype else tensor.to(converted.device, dtype)

        had_no_values = self.mu.is_meta
        super()._apply(convert, recurse)
        if had_no_values and not self.mu.is_meta:  # to_empty
            self.reset_parameters()
        return self

    @property
    def _is_hf_initialized(self) -> bool:
        """What transformers notes about a layer when it is through with it, see `transformers_loading`."""
        return self.__dict__.get("_noted_by_transformers", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_noted_by_transformers"] = value
        if value and self._born_without_values and not self.mu.is_meta:
            self._born_without_values = False
            initialise_what_was_not_loaded(self)


def stored_arguments(layer: NoiseLayer) -> dict[str, Any]:
    """Return the constructor arguments of a layer that a file keeps: without backend and generator, the machine's."""
    names = (
        *("num_structures", "dim", "structure_size", "granularity", "activation", "lower", "upper"),
        *("initial_mu", "initial_log_sigma", "same_on_all_ranks"),
    )
    return {name: getattr(layer, name) for name in names}


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _is_averaged(value: Any) -> TypeIs[Tensor]:
    """Return whether a state has numbers where a layer has a bool buffer."""
    return isinstance(value, Tensor) and value.dtype != torch.bool
