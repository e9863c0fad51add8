"""What a training run is told: its options, checked, with their defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from bmrs.checks import one_line, shown
from bmrs.names import DATASETS, EMBEDDED, MORE_DATASETS, NETWORK_NAMES, Granularity, check_spec
from bmrs.training.criterion_options import CriterionName, build_criterion, foreign_options
from bmrs.training.options import ConfigError, check_number, check_text, fits, flag, in_words, option
from bmrs.training.settings import (
    AugmentationName,
    OptimizerName,
    PaperNetwork,
    RecipeName,
    RecipeSettings,
    StartName,
    default_settings,
)

if TYPE_CHECKING:
    from bmrs.criteria import Criterion

# Options of one recipe alone, with their defaults; the other one does not take them.
_OWN_OPTIONS: dict[RecipeName, dict[str, Any]] = {
    "bmrs": {
        "noise_epochs": None,
        "temperature": None,
        "weight_lr": 0.0,
        "price_exponent": 0.5,
        "distillation": 0.0,
        "fine_tune_from": None,
        "schedule": "cosine",
        "warm_up": 0.05,
        "average": 0.0,
        "target_flops": None,
        "target_parameters": None,
        "target_latency": None,
    },
    "paper": {
        "kl_weight": "mean",
        "kl_warm_up": 0.0,
        "mode": "continuous",
        "fine_tune_noise": False,
        "prune_every": 1,
    },
}
_LARGEST_SEED = 2**64 - 1  # of torch's generators
_MOST = 10**6  # epochs: a typing error, not a wish
# The least and the largest value.
_WHOLE_NUMBERS: dict[str, tuple[int, int]] = {
    "epochs": (0, _MOST),
    "noise_epochs": (1, _MOST),
    "prune_every": (1, _MOST),
    "fine_tune_epochs": (0, _MOST),
    "seeds": (1, _MOST),
    "batch_size": (1, 10**9),
    "accumulate": (1, 10**9),
    "image_size": (1, 10**5),
    "workers": (0, 10**4),
    "hidden": (1, 10**9),
    "num_blocks": (0, 1000),
    "seed": (0, _LARGEST_SEED),
}
_SHARES = ("distillation", "label_smoothing", "warm_up", "average", "momentum")
_AT_LEAST_ZERO = ("kl_weight", "kl_warm_up", "weight_lr", "price_exponent", "weight_decay")
_ABOVE_ZERO = ("lr", "noise_lr", "temperature", "target_flops", "target_parameters", "target_latency")
# Options of which the result of one seed is independent, but for rounding.
_NOT_DECIDING = (
    "data_dir",
    "device",
    "cuda_graph",
    "seeds",
    "workers",
    "compile",
    "channels_last",
    "tensorboard",
    "energy",
)
_TARGETS = ("target_flops", "target_parameters", "target_latency")
_DEFAULT_CRITERION: dict[RecipeName, CriterionName] = {"bmrs": "bmrs-odds", "paper": "bmrs-normal"}


@dataclass(frozen=True)
class TrainConfig:
    """Options of one training run, each documented by its help text.

    None stands for a default. Those of the recipe are filled in at once, except where the other recipe owns the option;
    those that depend on model and data are left to `settings`.

    Raises:
        ConfigError: a value is bad, or options do not go together.
    """

    data: str = option(
        EMBEDDED,
        "images: fashion-mnist-subset, which comes with bmrs; mnist, fashion-mnist, cifar10, cifar100 or "
        "tiny-imagenet, from --data-dir; folder:DIR for class folders of images; or "
        "package.module:factory for torch datasets; default: the subset",
        group="images",
        metavar="DATA",
    )
    data_dir: str | None = option(
        None, "folder with the official files of --data", group="images", metavar="DIR"
    )
    image_size: int | None = option(
        None,
        "height and width that images are brought to; default: what --model is meant for",
        group="images",
        metavar="PIXELS",
    )
    augmentation: AugmentationName | None = option(
        None,
        "what is changed at random about training images: crop shifts them by up to an eighth, crop-flip "
        "mirrors them too; default: none (resnet, vgg, vit: crop-flip)",
        group="images",
    )
    normalization: Literal["data", "imagenet", "paper"] | None = option(
        None,
        "how images are scaled: to mean 0 and sd 1 of the training images, as ImageNet's, or as in the paper; default: "
        "paper for mnist, fashion-mnist and cifar10, imagenet with --weights, otherwise data",
        group="images",
    )
    skip_unreadable: bool = option(
        False,
        "folder:DIR: leave out images that cannot be read, instead of stopping; default: false",
        group="images",
    )
    workers: int | None = option(
        None,
        "processes that read images; default: as many as there are cores",
        group="images",
        metavar="N",
    )
    model: str = option(
        "lenet5",
        "network by its name in bmrs.models, or package.module:factory; default: lenet5",
        group="network",
        metavar="MODEL",
    )
    num_blocks: int | None = option(
        None,
        "mlp: hidden layers after the first; default: 7 on mnist, 5 on cifar10, 1 elsewhere",
        group="network",
        metavar="N",
    )
    hidden: int | None = option(
        None,
        "mlp: units of each hidden layer; default: 100 on mnist, 150 elsewhere",
        group="network",
        metavar="N",
    )
    weights: str | None = option(
        None,
        "file with weights to start from, safetensors or a torch state dict; published ones are for "
        "224 pixels (ResNets: above 64)",
        group="network",
        metavar="FILE",
    )
    new_classifier: bool = option(
        False,
        "--weights are for other classes: leave out their last layer and train; default: false",
        group="network",
    )
    noise_on: str | None = option(
        None,
        "what can be pruned: inner, what lies inside a block, where most is saved; paper, where the "
        "paper has it; suggest, what bmrs finds; or names of layers with * and ?, separated by commas; "
        "default: inner (recipe paper: paper; networks of your own: suggest)",
        group="network",
        metavar="WHERE",
    )
    recipe: RecipeName = option(
        "bmrs",
        "bmrs: train, learn the noise with the weights frozen, prune, compact, fine-tune the smaller "
        "network; paper: Algorithm 1 of the paper, which trains with noise and prunes on the way",
        group="training",
    )
    epochs: int | None = option(
        None,
        "epochs of training; default: 8 (recipe paper: 50, subset: 11; resnet, vgg, vit: 80; others: 20; "
        "recipe bmrs with --weights but no --new-classifier: 0)",
        group="training",
        metavar="N",
    )
    noise_epochs: int | None = option(
        None,
        "bmrs: epochs at most in which the noise learns; those left when decisions have settled go to "
        "fine-tuning; default: 2 (subset: 4; other "
        "networks: as many as settle as a rule)",
        group="training",
        metavar="N",
    )
    fine_tune_epochs: int | None = option(
        None,
        "epochs after the last pruning; default: 10 (subset: 12; resnet, vgg, vit: 40)",
        group="training",
        metavar="N",
    )
    batch_size: int | None = option(
        None,
        "images of a step; default: 64, subset: 32 (recipe paper: 32 to 128, see --print-config)",
        group="training",
        metavar="N",
    )
    accumulate: int = option(
        1,
        "parts that a batch is trained on one after another, to save memory; default: 1",
        group="training",
        metavar="N",
    )
    optimizer: OptimizerName | None = option(
        None, "default: adam (resnet, vgg: sgd; vit and networks of your own: adamw)", group="training"
    )
    lr: float | None = option(
        None,
        "the optimizer's learning rate; in recipe bmrs it starts at twice that and falls to 0 in each "
        "phase, as a cosine; default: 3e-3 (recipe paper: 6.8e-4 to 1.5e-3; other networks: see "
        "--print-config; recipe bmrs with --weights: a tenth)",
        group="training",
        metavar="RATE",
    )
    momentum: float | None = option(
        None,
        "sgd: Nesterov's momentum, from 0 to 1; default: 0.9",
        group="training",
        metavar="SHARE",
    )
    weight_decay: float | None = option(
        None,
        "the optimizer's, of weights alone: not of biases, normalisations and noise; default: 0 (sgd: "
        "5e-4, adamw: see --print-config)",
        group="training",
        metavar="RATE",
    )
    schedule: Literal["cosine", "constant"] | None = option(
        None,
        "bmrs: how the learning rate of weights goes; constant: it stays at --lr; default: cosine",
        group="training",
    )
    warm_up: float | None = option(
        None,
        "bmrs: share of the steps in which the learning rate of weights rises; default: 0.05",
        group="training",
        metavar="SHARE",
    )
    label_smoothing: float = option(
        0.0,
        "share of each label that is spread over all classes; default: 0",
        group="training",
        metavar="SHARE",
    )
    average: float | None = option(
        None,
        "bmrs: trained weights are a moving average (EMA) with this decay, such as 0.999; 0: none; "
        "default: 0",
        group="training",
        metavar="DECAY",
    )
    distillation: float | None = option(
        None,
        "bmrs: weight, from 0 to 1, of the trained network's softened answers in the loss of "
        "fine-tuning; default: 0",
        group="training",
        metavar="WEIGHT",
    )
    fine_tune_from: StartName | None = option(
        None,
        "bmrs: weights that fine-tuning starts from: those that pruning leaves, or refitted ones, by least squares; "
        "goes with --weight-lr 0; default: pruned (mlp, lenet_300_100: refitted)",
        group="training",
    )
    noise_lr: float | None = option(
        None,
        "learning rate of mu and log sigma, Adam's in recipe bmrs, --optimizer's in recipe paper; default: 0.05 "
        "(recipe paper: the same as --lr, subset: 6e-3, other networks: 0.01)",
        group="training",
        metavar="RATE",
    )
    weight_lr: float | None = option(
        None,
        "bmrs: Adam's learning rate of the weights while the noise learns; 0 freezes them, which is best "
        "where half of the network stays; a tenth of --lr is better for much smaller ones; default: 0",
        group="training",
        metavar="RATE",
    )
    granularity: Granularity | None = option(
        None,
        "draw noise per activation, per example and structure, or per batch and structure; default: "
        "sample (recipe paper: element, subset: sample)",
        group="training",
    )
    rivals: bool = option(
        True,
        "bmrs: also train, in as many epochs, what one would do instead: the dense network, its widths "
        "from scratch, structures at random; default: true",
        group="training",
    )
    criterion: CriterionName | None = option(
        None,
        "what decides which structures go; default: bmrs-odds (recipe paper: bmrs-normal)",
        group="what goes",
    )
    temperature: float | None = option(
        None,
        "bmrs: T, the posterior is that of the likelihood to the power 1/T; 1 is the evidence bound, the "
        "larger the more goes; default: 10 on the subset, 100 elsewhere (mlp: 30; other networks: one "
        "for 500 training images)",
        group="what goes",
        metavar="T",
    )
    price_exponent: float | None = option(
        None,
        "bmrs: how much more an expensive structure has to be worth: its share of parameters and FLOPs "
        "to this power is a factor on the temperature; 0: all pay alike; default: 0.5",
        group="what goes",
        metavar="EXPONENT",
    )
    target_flops: float | None = option(
        None,
        "bmrs: prune until the network has this share of its FLOPs (below 1) or so many (1 and more), in "
        "the order of evidence for what is saved; default: evidence alone decides",
        group="what goes",
        metavar="NUMBER",
    )
    target_parameters: float | None = option(
        None, "bmrs: the same for parameters", group="what goes", metavar="NUMBER"
    )
    target_latency: float | None = option(
        None,
        "bmrs: the same for the milliseconds that one image takes on this machine",
        group="what goes",
        metavar="MS",
    )
    p1: float | None = option(
        None,
        "bmrs-odds, bmrs-uniform: bits; below 2^-p1 a structure counts as off; default: 8",
        group="what goes",
        metavar="BITS",
    )
    prior_mean: float | None = option(
        None,
        "bmrs-normal: log θ where the reduced prior sits; default: -20",
        group="what goes",
        metavar="NATS",
    )
    tolerance: float | None = option(
        None,
        "bmrs-normal, bmrs-uniform: nats of log evidence that a structure may be worth and still go; "
        "default: 0, but for bmrs-normal 0.919, half of log 2π, which the paper's own code left out",
        group="what goes",
        metavar="NATS",
    )
    threshold: float | None = option(
        None,
        "snr, mean: prune below it; default: 1 for snr, 0.1 for mean",
        group="what goes",
        metavar="NUMBER",
    )
    ratio: float | None = option(
        None,
        "l2, gradient-norm: share of each layer's structures to prune each time",
        group="what goes",
        metavar="SHARE",
    )
    kl_weight: Literal["elbo", "mean"] | float | None = option(
        None,
        "paper: elbo: sum / training images; mean: mean over structures, then layers; or a factor on the "
        "sum; default: mean",
        group="recipe paper",
        metavar="{elbo,mean,NUMBER}",
    )
    kl_warm_up: float | None = option(
        None,
        "paper: epochs in which the weight of the KL term rises from 0; default: 0",
        group="recipe paper",
        metavar="EPOCHS",
    )
    mode: Literal["continuous", "post-training"] | None = option(
        None,
        "paper: prune every --prune-every epochs of training, or once after it; default: continuous",
        group="recipe paper",
    )
    prune_every: int | None = option(
        None, "paper: epochs from one pruning to the next; default: 1", group="recipe paper", metavar="N"
    )
    fine_tune_noise: bool | None = option(
        None,
        "paper: fine-tune with noise and KL, as the paper does, not with E[θ] in place of noise; "
        "default: false",
        group="recipe paper",
    )
    seed: int = option(
        0,
        "seed of the split, the weights, the batches and the noise; default: 0",
        group="seeds and device",
        metavar="SEED",
    )
    seeds: int = option(
        1,
        "number of runs, with seeds from --seed on; the table shows mean ± sd; default: 1",
        group="seeds and device",
        metavar="N",
    )
    device: str = option(
        "auto",
        "cpu, cuda, cuda:1, ...; auto: a GPU if there is one; default: auto",
        group="seeds and device",
        metavar="DEVICE",
    )
    precision: Literal["float32", "bfloat16"] = option(
        "float32",
        "bfloat16: in training what gains by it is computed so, under torch.autocast; default: float32",
        group="seeds and device",
    )
    compile: bool = option(
        False, "torch.compile the network while it trains; default: false", group="seeds and device"
    )
    channels_last: bool = option(
        False,
        "give the network images with the channels last, which some devices prefer; default: false",
        group="seeds and device",
    )
    cuda_graph: bool = option(
        False,
        "on a GPU, record a training step once and replay it, instead of launching its kernels; default: "
        "false",
        group="seeds and device",
    )
    tensorboard: bool = option(
        False,
        "write losses, accuracies and what happens to the structures for TensorBoard into the run "
        "folder; default: false",
        group="seeds and device",
    )
    energy: bool = option(
        False,
        "tell the energy of training and of 1,000 images in the table; needs codecarbon; default: false",
        group="seeds and device",
    )

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not fits(value, kind):
                raise ConfigError(f"{flag(name)} must be {in_words(kind)}, got {shown(value)}")
            if isinstance(value, str):
                check_text(flag(name), value)
        for name, (minimum, maximum) in _WHOLE_NUMBERS.items():
            check_number(name, getattr(self, name), minimum=minimum, maximum=maximum)
        for name in _AT_LEAST_ZERO:
            check_number(name, getattr(self, name), minimum=0)
        for name in _ABOVE_ZERO:
            check_number(name, getattr(self, name), minimum=0, or_equal=False)
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{flag(name)} must be a number from 0 to 1, got {shown(value)}")
        if self.seed + self.seeds - 1 > _LARGEST_SEED:
            raise ConfigError(f"--seed {self.seed} with --seeds {self.seeds} goes beyond {_LARGEST_SEED}")
        self._check_recipe()
        self._check_data_and_model()
        self.build_criterion()

    def _check_recipe(self) -> None:
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
        if self.noise_on is None:
            places = "suggest" if ":" in self.model else "paper" if self.recipe == "paper" else "inner"
            self._fill_in("noise_on", places)
        if self.criterion is None:
            self._fill_in("criterion", _DEFAULT_CRITERION[self.recipe])
        if self.cuda_graph and self.settings.optimizer == "sgd":
            raise ConfigError("--cuda-graph true goes with --optimizer adam or adamw only")
        if self.fine_tune_from == "refitted" and self.weight_lr:
            raise ConfigError(
                "--fine-tune-from refitted goes with --weight-lr 0 only: weights are refitted to the trained network"
            )
        targets = [name for name in _TARGETS if getattr(self, name)]
        if len(targets) > 1:
            raise ConfigError(
                f"{flag(targets[0])} and {flag(targets[1])} do not go together: give one budget"
            )

    def _check_data_and_model(self) -> None:
        if ":" not in self.model:
            self._fill_in("model", self.model.replace("-", "_"))
        try:
            check_spec(self.data, option="--data")
        except ValueError as error:
            hint = f"; for that folder give folder:{self.data}" if Path(self.data).is_dir() else ""
            raise ConfigError(f"{error}{hint}") from error
        if ":" not in self.model and self.model not in NETWORK_NAMES:
            raise ConfigError(
                f"--model must be {', '.join(NETWORK_NAMES)} or package.module:factory, got {shown(self.model)}"
            )
        if self.data == EMBEDDED or ":" in self.data:
            self._check_unused(
                "data_dir",
                f"--data {' or '.join(name for name in (*DATASETS, *MORE_DATASETS) if name != EMBEDDED)}",
            )
        elif self.data_dir is None:
            raise ConfigError(f"--data {self.data} needs --data-dir, the folder with its official files")
        if self.model != "mlp":
            self._check_unused("num_blocks", "--model mlp")
            self._check_unused("hidden", "--model mlp")
        if self.settings.optimizer != "sgd":
            self._check_unused("momentum", "--optimizer sgd")
        elif self.momentum is None:
            self._fill_in("momentum", 0.9)
        if self.skip_unreadable and not self.data.startswith("folder:"):
            raise ConfigError("--skip-unreadable true goes with --data folder:DIR only")
        if self.noise_on in ("inner", "paper") and ":" in self.model:
            raise ConfigError(
                f"--noise-on {self.noise_on} goes with networks of bmrs only: give suggest or names of layers"
            )
        if self.new_classifier and self.weights is None:
            raise ConfigError("--new-classifier true goes with --weights only")
        if self.epochs == 0 and self.recipe == "paper":
            raise ConfigError("--epochs must be a number of at least 1, got 0; recipe paper prunes in them")
        if self.epochs == 0 and not self.pretrained:
            raise ConfigError(
                "--epochs must be a number of at least 1, got 0; only --weights need no training"
            )

    @property
    def is_sequence(self) -> bool:
        """Whether the network is one of the two of the paper, a sequence of layers."""
        return self.model in get_args(PaperNetwork)

    @property
    def target(self) -> str | None:
        """Name of the option that states a budget, None if evidence alone decides."""
        return next((name for name in _TARGETS if getattr(self, name) is not None), None)

    @property
    def pretrained(self) -> bool:
        """Whether training starts from weights for these very classes."""
        return self.weights is not None and not self.new_classifier

    @property
    def settings(self) -> RecipeSettings:
        """The options that depend on model and data: as given, or else their defaults."""
        defaults = default_settings(
            self.recipe,
            self.model,
            self.data,
            weights=self.weights is not None,
            pretrained=self.pretrained,
        )
        if self.weight_lr:  # weights that went on training are not what the trained network was
            defaults = defaults._replace(fine_tune_from="pruned")
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
        for name, takers in foreign_options(self.criterion).items():
            self._check_unused(name, f"--criterion {takers}")
        return build_criterion(self.criterion, self.to_dict())

    def _fill_in(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everybody else

    def _check_unused(self, name: str, owner: str) -> None:
        value = getattr(self, name)
        if value is not None:
            raise ConfigError(f"{flag(name)} {one_line(value)} goes with {owner} only")
