"""Defaults of a training run that depend on its recipe, its network and its data."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

from bmrs.names import EMBEDDED, Granularity

RecipeName: TypeAlias = Literal["bmrs", "paper"]
OptimizerName: TypeAlias = Literal["adam", "adamw", "sgd"]
PaperNetwork: TypeAlias = Literal["lenet5", "mlp"]
StartName: TypeAlias = Literal["pruned", "refitted"]
AugmentationName: TypeAlias = Literal["none", "crop", "crop-flip"]


class RecipeSettings(NamedTuple):
    """Defaults that depend on recipe, model and data.

    `num_blocks` and `hidden` are the MLP's alone. Of the recipe bmrs, `noise_epochs` of None are as many as take the
    noise `NOISE_DISTANCE`, and a `temperature` of None is one for each `IMAGES_A_DEGREE` training images.
    """

    epochs: int
    fine_tune_epochs: int
    batch_size: int
    lr: float
    noise_lr: float
    granularity: Granularity
    num_blocks: int | None = None
    hidden: int | None = None
    noise_epochs: int | None = None
    temperature: float | None = None
    optimizer: OptimizerName = "adam"
    weight_decay: float = 0.0
    augmentation: AugmentationName = "none"
    fine_tune_from: StartName | None = None


IMAGES_A_DEGREE = 500
"""LeNet-5 begins to lose accuracy where there are fewer training images than that for each unit of temperature."""

NOISE_DISTANCE = 30.0
"""Noise's learning rate times steps, in which posteriors settle as a rule."""

_LENETS = ("lenet5", "lenet5_caffe", "lenet_300_100")
_PERCEPTRONS = ("mlp", "lenet_300_100")

PAPER_SETTINGS: dict[tuple[str, str], RecipeSettings] = {
    # The paper's (arXiv 2406.01345, Appendix C).
    ("lenet5", "mnist"): RecipeSettings(50, 10, 128, 1.4e-3, 1.4e-3, "element"),
    ("lenet5", "fashion-mnist"): RecipeSettings(50, 10, 32, 1.4e-3, 1.4e-3, "element"),
    ("lenet5", "cifar10"): RecipeSettings(50, 10, 64, 1e-3, 1e-3, "element"),
    ("mlp", "mnist"): RecipeSettings(50, 10, 128, 8.5e-4, 8.5e-4, "element", 7, 100),
    ("mlp", "fashion-mnist"): RecipeSettings(50, 10, 128, 1.5e-3, 1.5e-3, "element", 1, 150),
    ("mlp", "cifar10"): RecipeSettings(50, 10, 32, 6.8e-4, 6.8e-4, "element", 5, 150),
    # Ours: with a tenth of the images and fewer epochs, the noise has to move faster than the weights. Noise that is
    # drawn at every pixel averages out over a feature map, so that little would tell useful filters from others.
    ("lenet5", EMBEDDED): RecipeSettings(11, 12, 32, 1.4e-3, 6e-3, "sample"),
    ("mlp", EMBEDDED): RecipeSettings(11, 12, 32, 1.5e-3, 6e-3, "sample", 1, 150),
}


def default_settings(
    recipe: RecipeName, model: str, data: str, *, weights: bool = False, pretrained: bool = False
) -> RecipeSettings:
    """Return the defaults of a recipe for a network and data, by the names that the options give them.

    Args:
        recipe: the recipe.
        model: a network's name, or "package.module:factory".
        data: a data set's name, "folder:..." or "package.module:factory".
        weights: whether training starts from weights, which too large steps would spoil.
        pretrained: whether training starts from weights for these very classes, so that it is over already.
    """
    paper = PAPER_SETTINGS.get((model, data)) or _of_family(model)
    if recipe == "paper":
        return paper
    ours = _ours(paper, model, data)
    if weights:
        ours = ours._replace(lr=ours.lr / 10)
    return ours._replace(epochs=0) if pretrained else ours


def _ours(paper: RecipeSettings, model: str, data: str) -> RecipeSettings:
    """Return the recipe's own settings: the paper's network, and a schedule that was chosen on validation images."""
    changes: dict[str, Any] = {"granularity": "sample", "noise_lr": 5e-2}
    # Of a deep perceptron at a small size hardly a signal is left after pruning. Networks with convolutions, which give
    # whole filters up, learned better ones from where pruning left them.
    changes["fine_tune_from"] = "refitted" if model in _PERCEPTRONS else "pruned"
    if model in (*_LENETS, *_PERCEPTRONS):
        epochs, noise_epochs, fine_tune_epochs = (8, 4, 12) if data == EMBEDDED else (8, 2, 10)
        changes |= {
            "epochs": epochs,
            "noise_epochs": noise_epochs,
            "fine_tune_epochs": fine_tune_epochs,
            "batch_size": 32 if data == EMBEDDED else 64,
            "lr": 3e-3,
        }
        # Half of the parameters and more go, with little loss.
        if (model, data) in PAPER_SETTINGS:
            changes["temperature"] = 10.0 if data == EMBEDDED else 30.0 if model in _PERCEPTRONS else 100.0
    return paper._replace(**changes)


def _of_family(model: str) -> RecipeSettings:
    """Return what is usual for networks of a kind, on which the paper says nothing. None of it was tuned here."""
    if model == "mlp":
        return RecipeSettings(50, 10, 128, 1.5e-3, 1.5e-3, "element", 1, 150)
    if model in _LENETS:
        return RecipeSettings(50, 10, 128, 1.4e-3, 1.4e-3, "element")
    if model.startswith(("resnet", "vgg")):
        return RecipeSettings(
            80,
            40,
            128,
            5e-2,
            1e-2,
            "sample",
            optimizer="sgd",
            weight_decay=5e-4,
            augmentation="crop-flip",
        )
    if model.startswith("vit"):
        return RecipeSettings(
            80,
            40,
            128,
            3e-4,
            1e-2,
            "sample",
            optimizer="adamw",
            weight_decay=5e-2,
            augmentation="crop-flip",
        )
    return RecipeSettings(20, 10, 64, 1e-3, 1e-2, "sample", optimizer="adamw", weight_decay=1e-2)
