"""What a training run is told: its options, checked, with their defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from bmrs.checks import is_finite, one_line, shown
from bmrs.criteria import (
    L2,
    PAPER_TOLERANCE,
    SNR,
    BMRSNormal,
    BMRSOdds,
    BMRSUniform,
    Criterion,
    GradientNorm,
    Mean,
)
from bmrs.data import EMBEDDED, DataName
from bmrs.noise.layer import NoiseLayer
from bmrs.training.settings import SETTINGS, ModelName, RecipeName, RecipeSettings
from bmrs_kernels.options import Granularity

CriterionName: TypeAlias = Literal[
    "bmrs-odds", "bmrs-normal", "bmrs-uniform", "snr", "mean", "l2", "gradient-norm"
]


class ConfigError(ValueError):
    """An option has a bad value or does not go with another; the message names it."""


# Each criterion's own options, with the defaults of a run. The tolerance of bmrs-normal is what the paper's own code
# amounts to, which leaves the 2π out of Eq. 8: the exact ΔF of a structure without evidence comes to 0 from below.
_CRITERIA: dict[CriterionName, tuple[type[Criterion], dict[str, float | None]]] = {
    "bmrs-odds": (BMRSOdds, {"p1": 8}),
    "bmrs-normal": (BMRSNormal, {"prior_mean": None, "tolerance": PAPER_TOLERANCE}),
    "bmrs-uniform": (BMRSUniform, {"p1": 8, "tolerance": 0.0}),
    "snr": (SNR, {"threshold": 1.0}),
    "mean": (Mean, {"threshold": 0.1}),
    "l2": (L2, {"ratio": None}),
    "gradient-norm": (GradientNorm, {"ratio": None}),
}

# Options of one recipe alone, with their defaults; the other one does not take them.
_OWN_OPTIONS: dict[RecipeName, dict[str, Any]] = {
    "bmrs": {
        "noise_epochs": None,
        "temperature": None,
        "weight_lr": 0.0,
        "price_exponent": 0.5,
        "distillation": 0.0,
    },
    "paper": {"kl_weight": "mean", "mode": "continuous", "fine_tune_noise": False, "prune_every": 1},
}
_LARGEST_SEED = 2**64 - 1  # of torch's generators
_MOST = 10**6  # epochs: a typing error, not a wish
# The least and the largest value.
_WHOLE_NUMBERS: dict[str, tuple[int, int]] = {
    "epochs": (1, _MOST),
    "noise_epochs": (1, _MOST),
    "prune_every": (1, _MOST),
    "fine_tune_epochs": (0, _MOST),
    "seeds": (1, _MOST),
    "batch_size": (1, 10**9),
    "hidden": (1, 10**9),
    "num_blocks": (0, 1000),
    "seed": (0, _LARGEST_SEED),
}
# Options of which the result of one seed is independent, but for rounding.
_NOT_DECIDING = ("data_dir", "device", "cuda_graph", "seeds")
_DEFAULT_CRITERION: dict[RecipeName, CriterionName] = {"bmrs": "bmrs-odds", "paper": "bmrs-normal"}


def _help(text: str, *, group: str, metavar: str | None = None) -> dict[str, str | None]:
    return {"help": text, "group": group, "metavar": metavar}


@dataclass(frozen=True)
class TrainConfig:
    """Options of one training run, each documented by its help text.

    None stands for a default. Those of the recipe are filled in at once, except where the other recipe owns the option;
    those that depend on model and data are left to `settings`.

    Raises:
        ConfigError: a value is bad, or options do not go together.
    """

    data: DataName = field(
        default=EMBEDDED,
        metadata=_help(
            "images; all but the subset, which comes with bmrs and is the default, need --data-dir",
            group="images and network",
        ),
    )
    data_dir: str | None = field(
        default=None,
        metadata=_help("folder with the official files of --data", group="images and network", metavar="DIR"),
    )
    model: ModelName = field(
        default="lenet5", metadata=_help("network; default: lenet5", group="images and network")
    )
    num_blocks: int | None = field(
        default=None,
        metadata=_help(
            "mlp: hidden layers after the first; default: 7 on mnist, 5 on cifar10, 1 elsewhere",
            group="images and network",
            metavar="N",
        ),
    )
    hidden: int | None = field(
        default=None,
        metadata=_help(
            "mlp: units of each hidden layer; default: 100 on mnist, 150 elsewhere",
            group="images and network",
            metavar="N",
        ),
    )
    recipe: RecipeName = field(
        default="bmrs",
        metadata=_help(
            "bmrs: train, learn the noise with the weights frozen, prune, compact, fine-tune the smaller network; "
            "paper: Algorithm 1 of the paper, which trains with noise and prunes on the way",
            group="training",
        ),
    )
    epochs: int | None = field(
        default=None,
        metadata=_help(
            "epochs of training; default: 8 (recipe paper: 50, subset: 11)", group="training", metavar="N"
        ),
    )
    noise_epochs: int | None = field(
        default=None,
        metadata=_help(
            "bmrs: epochs at most in which the noise learns; those left when decisions have settled go to fine-tuning; "
            "default: 2 (subset: 4)",
            group="training",
            metavar="N",
        ),
    )
    fine_tune_epochs: int | None = field(
        default=None,
        metadata=_help(
            "epochs after the last pruning; default: 10 (subset: 12)", group="training", metavar="N"
        ),
    )
    batch_size: int | None = field(
        default=None,
        metadata=_help(
            "images of a step; default: 64, subset: 32 (recipe paper: 32 to 128, see --print-config)",
            group="training",
            metavar="N",
        ),
    )
    lr: float | None = field(
        default=None,
        metadata=_help(
            "Adam's learning rate; in recipe bmrs it starts at twice that and falls to 0 in each phase, as a cosine; "
            "default: 3e-3 (recipe paper: 6.8e-4 to 1.5e-3, see --print-config)",
            group="training",
            metavar="RATE",
        ),
    )
    noise_lr: float | None = field(
        default=None,
        metadata=_help(
            "Adam's learning rate of mu and log sigma; default: 0.05 (recipe paper: the same as --lr, subset: 6e-3)",
            group="training",
            metavar="RATE",
        ),
    )
    weight_lr: float | None = field(
        default=None,
        metadata=_help(
            "bmrs: Adam's learning rate of the weights while the noise learns; 0 freezes them, which is best where "
            "half of the network stays; a tenth of --lr is better for much smaller ones; default: 0",
            group="training",
            metavar="RATE",
        ),
    )
    distillation: float | None = field(
        default=None,
        metadata=_help(
            "bmrs: weight, from 0 to 1, of the trained network's softened answers in the loss of fine-tuning; "
            "default: 0",
            group="training",
            metavar="WEIGHT",
        ),
    )
    granularity: Granularity | None = field(
        default=None,
        metadata=_help(
            "draw noise per activation, per example and structure, or per batch and structure; default: sample "
            "(recipe paper: element, subset: sample)",
            group="training",
        ),
    )
    criterion: CriterionName | None = field(
        default=None,
        metadata=_help(
            "what decides which structures go; default: bmrs-odds (recipe paper: bmrs-normal)",
            group="what goes",
        ),
    )
    temperature: float | None = field(
        default=None,
        metadata=_help(
            "bmrs: T, the posterior is that of the likelihood to the power 1/T; 1 is the evidence bound, the larger "
            "the more goes; default: 10 on the subset, 100 elsewhere (mlp: 30)",
            group="what goes",
            metavar="T",
        ),
    )
    price_exponent: float | None = field(
        default=None,
        metadata=_help(
            "bmrs: how much more an expensive structure has to be worth: its share of parameters and FLOPs to this "
            "power is a factor on the temperature; 0: all pay alike; default: 0.5",
            group="what goes",
            metavar="EXPONENT",
        ),
    )
    p1: float | None = field(
        default=None,
        metadata=_help(
            "bmrs-odds, bmrs-uniform: bits; below 2^-p1 a structure counts as off; default: 8",
            group="what goes",
            metavar="BITS",
        ),
    )
    prior_mean: float | None = field(
        default=None,
        metadata=_help(
            "bmrs-normal: log θ where the reduced prior sits; default: -20", group="what goes", metavar="NATS"
        ),
    )
    tolerance: float | None = field(
        default=None,
        metadata=_help(
            "bmrs-normal, bmrs-uniform: nats of log evidence that a structure may be worth and still go; default: 0, "
            "but for bmrs-normal 0.919, half of log 2π, which the paper's own code left out",
            group="what goes",
            metavar="NATS",
        ),
    )
    threshold: float | None = field(
        default=None,
        metadata=_help(
            "snr, mean: prune below it; default: 1 for snr, 0.1 for mean", group="what goes", metavar="NUMBER"
        ),
    )
    ratio: float | None = field(
        default=None,
        metadata=_help(
            "l2, gradient-norm: share of each layer's structures to prune each time",
            group="what goes",
            metavar="SHARE",
        ),
    )
    kl_weight: Literal["elbo", "mean"] | float | None = field(
        default=None,
        metadata=_help(
            "paper: elbo: sum / training images; mean: mean over structures, then layers; or a factor on the sum; "
            "default: mean",
            group="recipe paper",
            metavar="{elbo,mean,NUMBER}",
        ),
    )
    mode: Literal["continuous", "post-training"] | None = field(
        default=None,
        metadata=_help(
            "paper: prune every --prune-every epochs of training, or once after it; default: continuous",
            group="recipe paper",
        ),
    )
    prune_every: int | None = field(
        default=None,
        metadata=_help(
            "paper: epochs from one pruning to the next; default: 1", group="recipe paper", metavar="N"
        ),
    )
    fine_tune_noise: bool | None = field(
        default=None,
        metadata=_help(
            "paper: fine-tune with noise and KL, as the paper does, not with E[θ] in place of noise; default: false",
            group="recipe paper",
        ),
    )
    seed: int = field(
        default=0,
        metadata=_help(
            "seed of the split, the weights, the batches and the noise; default: 0",
            group="seeds and device",
            metavar="SEED",
        ),
    )
    seeds: int = field(
        default=1,
        metadata=_help(
            "number of runs, with seeds from --seed on; the table shows mean ± sd; default: 1",
            group="seeds and device",
            metavar="N",
        ),
    )
    device: str = field(
        default="auto",
        metadata=_help(
            "cpu, cuda, cuda:1, ...; auto: a GPU if there is one; default: auto",
            group="seeds and device",
            metavar="DEVICE",
        ),
    )
    cuda_graph: bool = field(
        default=False,
        metadata=_help(
            "on a GPU, record a training step once and replay it, instead of launching its kernels; default: false",
            group="seeds and device",
        ),
    )

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind):
                raise ConfigError(f"{flag(name)} must be {expected_value(name)}, got {shown(value)}")
            if isinstance(value, str):
                check_text(flag(name), value)
        for name, (minimum, maximum) in _WHOLE_NUMBERS.items():
            self._check_number(name, minimum=minimum, maximum=maximum)
        for name in ("kl_weight", "weight_lr", "price_exponent", "distillation"):
            self._check_number(name, minimum=0)
        for name in ("lr", "noise_lr", "temperature"):
            self._check_number(name, minimum=0, or_equal=False)
        if self.seed + self.seeds - 1 > _LARGEST_SEED:
            raise ConfigError(f"--seed {self.seed} with --seeds {self.seeds} goes beyond {_LARGEST_SEED}")
        if self.distillation is not None and self.distillation > 1:
            raise ConfigError(f"--distillation must be a number from 0 to 1, got {shown(self.distillation)}")
        for recipe, options in _OWN_OPTIONS.items():
            for name, default in options.items():
                if recipe != self.recipe:
                    self._check_unused(name, f"--recipe {recipe}")
                elif getattr(self, name) is None:
                    self._fill_in(name, default)
        if self.recipe == "bmrs" and self.criterion == "gradient-norm":
            raise ConfigError(
                "--criterion gradient-norm goes with --recipe paper only: frozen weights have no gradient"
            )
        if self.criterion is None:
            self._fill_in("criterion", _DEFAULT_CRITERION[self.recipe])

        if self.data == EMBEDDED:
            self._check_unused("data_dir", "--data mnist, fashion-mnist or cifar10")
        elif self.data_dir is None:
            raise ConfigError(f"--data {self.data} needs --data-dir, the folder with its official files")
        if self.model != "mlp":
            self._check_unused("num_blocks", "--model mlp")
            self._check_unused("hidden", "--model mlp")
        self.build_criterion()

    @property
    def settings(self) -> RecipeSettings:
        """The options that depend on model and data: as given, or else their defaults."""
        defaults = SETTINGS[self.recipe][self.model, self.data]
        given = {name: getattr(self, name) for name in RecipeSettings._fields}
        return defaults._replace(**{name: value for name, value in given.items() if value is not None})

    def resolved(self) -> TrainConfig:
        """Return the config with the defaults of its model and data written out."""
        return replace(self, **self.settings._asdict())

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values, which `TrainConfig` and `bmrs train --config` take."""
        return asdict(self)

    def deciding_options(self) -> dict[str, Any]:
        """Return the options that decide what a run of one seed comes to: all but where its data lie and it runs."""
        resolved = self.resolved().to_dict()
        return {name: value for name, value in resolved.items() if name not in _NOT_DECIDING}

    def build_criterion(self) -> Criterion:
        """Return the criterion with its own options, as given or else their defaults."""
        assert self.criterion is not None, "filled in"
        kind, defaults = _CRITERIA[self.criterion]
        for other in dict.fromkeys(name for _, options in _CRITERIA.values() for name in options):
            if other not in defaults:
                takers = " or ".join(name for name, (_, options) in _CRITERIA.items() if other in options)
                self._check_unused(other, f"--criterion {takers}")
        given = {name: getattr(self, name) for name in defaults if getattr(self, name) is not None}
        if "ratio" in defaults and not given:
            raise ConfigError(f"--criterion {self.criterion} needs --ratio")
        try:
            criterion = kind(**defaults | given)
            if not criterion.needs_producer:
                criterion(NoiseLayer(1))  # some limits are those of the layer's interval
        except ValueError as error:
            raise ConfigError(f"--criterion {self.criterion}: {one_line(error)}") from error
        return criterion

    def _fill_in(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everybody else

    def _check_number(
        self, name: str, *, minimum: float, or_equal: bool = True, maximum: int | None = None
    ) -> None:
        value: Any = getattr(self, name)
        if value is None or isinstance(value, str):
            return
        finite = isinstance(value, int) or is_finite(value)
        if not finite or value < minimum or (value == minimum and not or_equal):
            expected = f"of at least {minimum}" if or_equal else f"greater than {minimum}"
            raise ConfigError(f"{flag(name)} must be a number {expected}, got {shown(value)}")
        if maximum is not None and value > maximum:
            raise ConfigError(f"{flag(name)} must be a number of at most {maximum}, got {shown(value)}")

    def _check_unused(self, name: str, owner: str) -> None:
        value = getattr(self, name)
        if value is not None:
            raise ConfigError(f"{flag(name)} {one_line(value)} goes with {owner} only")


def flag(name: str) -> str:
    """Return the command line's flag of an option."""
    return f"--{name.replace('_', '-')}"


def expected_value(name: str) -> str:
    """Return in words what kind of value an option of `TrainConfig` takes."""
    *others, last = _describe(get_type_hints(TrainConfig)[name])
    return f"{', '.join(others)} or {last}" if others else last


def choices_of(name: str) -> tuple[str, ...]:
    """Return the words that an option of `TrainConfig` takes; empty for one that takes other values."""
    kind = get_type_hints(TrainConfig)[name]
    literals = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
    if kind is bool or bool in get_args(kind):
        return ("true", "false")
    return get_args(literals[0]) if literals else ()


def _describe(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_args(kind):
        return [text for each in get_args(kind) for text in _describe(each)]
    return {int: ["a whole number"], float: ["a number"], str: ["a text"], bool: ["true or false"]}.get(
        kind, []
    )


def check_text(name: str, value: str) -> None:
    """Raise ConfigError unless a text, such as a path, can be written into a file and given to the system."""
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"{name} must be text in UTF-8 without NUL characters, got {shown(value)}")


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(_fits(value, each) for each in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, float) or (isinstance(value, int) and is_finite(value))
    return isinstance(value, kind)
