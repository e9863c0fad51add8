"""What a run should not have come to: said in words, with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmrs.training.config import TrainConfig
from bmrs.training.options import flag

NEAR_CHANCE = 0.05
"""An accuracy that is no further above that of guessing is called chance."""

FAR_BELOW = 0.05
"""An accuracy that is further below the dense network's is told."""

# What prunes less, by criterion; what does so with any of them is said by recipe.
_PRUNES_LESS = {
    "bmrs-normal": "--tolerance 0",
    "bmrs-uniform": "a larger --p1",
    "bmrs-odds": "a larger --p1",
    "snr": "a lower --threshold",
    "mean": "a lower --threshold",
    "l2": "a smaller --ratio",
    "gradient-norm": "a smaller --ratio",
}
_BY_NORMS = ("l2", "gradient-norm")


def shortfalls(
    config: TrainConfig,
    history: Sequence[Mapping[str, Any]],
    *,
    kept: Mapping[str, tuple[int, int]],
    dense: float,
    compacted: float,
    num_classes: int,
) -> tuple[str, ...]:
    """Return a sentence or two about each thing that went wrong in a finished run, none if all is well.

    Args:
        config: the run's options.
        history: the epochs of the network with noise.
        kept: structures kept and structures in all, by noise layer.
        dense: share of test images that the dense network classifies rightly.
        compacted: the same of the compacted network.
        num_classes: how many classes there are.
    """
    found = []
    prune_less = f"To prune less, take {_prunes_less(config, history)}."
    # A pruning may ask for a layer that an earlier one left with one structure.
    asked = {
        layer["name"]
        for row in history
        for layer in row.get("pruning", {}).get("layers", ())
        if layer["best_kept"]
    }
    if emptied := [f"{name} ({kept[name][1]})" for name in kept if name in asked]:
        found.append(
            f"{config.criterion} asked for every structure of {', '.join(emptied)}; the best one of a layer was kept "
            f"only because a layer cannot be empty. {prune_less}"
        )
    narrow = [
        f"{name} (of {structures})"
        for name, (left, structures) in kept.items()
        if left == 1 < structures and name not in asked
    ]
    if narrow:
        found.append(f"One structure alone is left of {', '.join(narrow)}. {prune_less}")
    pruning = history[-1].get("pruning", {}) if history else {}
    if config.target is not None and not pruning.get("budget", {}).get("met", True):
        found.append(
            f"The network is not within {flag(config.target)} {getattr(config, config.target):g}: the nearest that was "
            "found is the one that was delivered. Try again on a quiet machine, or take a smaller one to come below it."
        )
    nothing_pruned = all(left == structures for left, structures in kept.values())
    if nothing_pruned:
        found.append(f"Nothing was pruned, so that nothing became smaller. {_prunes_more(config, history)}")

    tune_longer = "fine-tune longer (--fine-tune-epochs) or with a lower --lr"
    to_do = (
        f"As nothing was pruned, {tune_longer}."
        if nothing_pruned
        else f"{prune_less[:-1]}, or {tune_longer}."
    )
    chance = 1 / num_classes
    if dense <= chance + NEAR_CHANCE:
        found.append(
            f"The dense network has learned next to nothing: {dense:.2%} of the test images, where guessing gives "
            f"{chance:.2%}. Train longer (--epochs) or with another --lr; until then the comparison says nothing."
        )
    elif compacted <= chance + NEAR_CHANCE:
        found.append(
            f"The compacted network is near chance: {compacted:.2%} of the test images, where guessing gives "
            f"{chance:.2%} and the dense network {dense:.2%}. {to_do}"
        )
    elif compacted < dense - FAR_BELOW:
        found.append(
            f"The compacted network is {100 * (dense - compacted):.1f} points below the dense one: {compacted:.2%} of "
            f"the test images against {dense:.2%}. {to_do}"
        )
    return tuple(found)


def _prunes_less(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> str:
    assert config.criterion is not None, "filled in"
    if config.target is not None:
        return f"a larger {flag(config.target)}"
    ways = [] if config.criterion in _BY_NORMS else [_weaker_prior(config, history)]
    if config.criterion != "bmrs-normal" or config.tolerance != 0:
        ways.append(_PRUNES_LESS[config.criterion])
    return ", ".join(ways) + " or another --criterion"


def _weaker_prior(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> str:
    if config.recipe == "bmrs":
        return (
            f"a lower --temperature (it was {_last(history, 'temperature', config.settings.temperature):g})"
        )
    return "--kl-weight elbo" if config.kl_weight != "elbo" else "a smaller --kl-weight"


def _prunes_more(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> str:
    if config.target is not None:
        return f"The network is within {flag(config.target)} as it is: take a smaller one."
    if config.criterion in _BY_NORMS:
        return "Take a larger --ratio."
    if config.recipe == "paper":
        return "Train longer (--epochs) or with a larger --noise-lr or --kl-weight."
    if not _last(history, "settled", False):
        return "The noise was cut off before it settled: take more --noise-epochs."
    return f"Take a higher --temperature (it was {_last(history, 'temperature', None):g})."


def _last(history: Sequence[Mapping[str, Any]], name: str, default: Any) -> Any:
    return history[-1][name] if history else default
