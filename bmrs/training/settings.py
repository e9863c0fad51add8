"""Defaults of a training run that depend on its recipe, its network and its data."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from bmrs.data import EMBEDDED, DataName
from bmrs_kernels.options import Granularity

ModelName: TypeAlias = Literal["lenet5", "mlp"]
RecipeName: TypeAlias = Literal["bmrs", "paper"]


class RecipeSettings(NamedTuple):
    """Defaults that depend on recipe, model and data.

    `num_blocks` and `hidden` are the MLP's alone, `noise_epochs` and `temperature` those of the recipe bmrs.
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


PAPER_SETTINGS: dict[tuple[ModelName, DataName], RecipeSettings] = {
    # The paper's (arXiv 2406.01345, Appendix C).
    ("lenet5", "mnist"): RecipeSettings(50, 10, 128, 1.4e-3, 1.4e-3, "element"),
    ("lenet5", "fashion-mnist"): RecipeSettings(50, 10, 32, 1.4e-3, 1.4e-3, "element"),
    ("lenet5", "cifar10"): RecipeSettings(50, 10, 64, 1e-3, 1e-3, "element"),
    ("mlp", "mnist"): RecipeSettings(50, 10, 128, 8.5e-4, 8.5e-4, "element", 7, 100),
    ("mlp", "fashion-mnist"): RecipeSettings(50, 10, 128, 1.5e-3, 1.5e-3, "element", 1, 150),
    ("mlp", "cifar10"): RecipeSettings(50, 10, 32, 6.8e-4, 6.8e-4, "element", 5, 150),
    # Ours: with a tenth of the images and fewer epochs, the noise has to move faster than the weights. Noise that is
    # drawn at every pixel averages out over a feature map, so that little would tell useful filters from others.
    ("lenet5", "fashion-mnist-subset"): RecipeSettings(11, 12, 32, 1.4e-3, 6e-3, "sample"),
    ("mlp", "fashion-mnist-subset"): RecipeSettings(11, 12, 32, 1.5e-3, 6e-3, "sample", 1, 150),
}


# By model and whether the images are the few embedded ones; half of the parameters and more go, with little loss.
_TEMPERATURES: dict[tuple[ModelName, bool], float] = {
    ("lenet5", True): 10.0,
    ("lenet5", False): 100.0,
    ("mlp", True): 10.0,
    ("mlp", False): 30.0,
}


def _ours(model: ModelName, data: DataName) -> RecipeSettings:
    """Return the recipe's own settings: the paper's network, and a schedule that was chosen on validation images."""
    paper = PAPER_SETTINGS[model, data]
    epochs, noise_epochs, fine_tune_epochs = (8, 4, 12) if data == EMBEDDED else (8, 2, 10)
    return paper._replace(
        epochs=epochs,
        noise_epochs=noise_epochs,
        fine_tune_epochs=fine_tune_epochs,
        batch_size=32 if data == EMBEDDED else 64,
        lr=3e-3,
        noise_lr=5e-2,
        granularity="sample",
        temperature=_TEMPERATURES[model, data == EMBEDDED],
    )


SETTINGS: dict[RecipeName, dict[tuple[ModelName, DataName], RecipeSettings]] = {
    "paper": PAPER_SETTINGS,
    "bmrs": {key: _ours(*key) for key in PAPER_SETTINGS},
}
