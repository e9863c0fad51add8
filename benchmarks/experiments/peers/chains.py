"""Every way to a smaller chain of layers: LeNet-5 and the MLP."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import bmrs
from benchmarks.experiments.peers.budget import Chain, kept, minus_losses
from benchmarks.experiments.peers.comparison import CPU, Built, Comparison, Subject, Way, in_rounds, nothing
from benchmarks.rivals import torch_pruning
from bmrs.budget.joint_choice import JointChoice
from bmrs.data import EMBEDDED
from bmrs.graph.inputs import as_inputs
from bmrs.graph.masked_graph import MaskedGraph, Unit
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.learner import PosteriorLearner
from bmrs.training import TrainConfig, algorithm1, recipe
from bmrs.training.epoch import batches_of
from bmrs.training.evaluation import accuracy
from bmrs.training.settings import PAPER_SETTINGS

SIZES = ("own", "40 %", "20 %", "8 %")
"""What the networks that are compared take: what the posteriors leave by themselves, and shares of the FLOPs."""

RIVALS = {
    "random, uniform": ("random", False),
    "L2, uniform": ("L2", False),
    "Taylor, uniform": ("Taylor", False),
    "L2, global": ("L2", True),
    "Taylor, global": ("Taylor", True),
}

IN_ROUNDS = {"L2, in rounds": "L2", "Taylor, in rounds": "Taylor"}
"""Torch-Pruning's own recipe, which prunes and trains by turns."""

WEIGHT_RATES = {"weights trained slowly, uniform": 0.1, "weights trained, uniform": 1.0}
"""Variants that train the weights while the noise learns, at a share of the learning rate; on the embedded images."""


def config_of(subject: Subject, data_dir: str | None, **epochs: int) -> TrainConfig:
    """Return what `bmrs train` would be told.

    The settings were chosen on validation images, of other seeds' splits, and the learning rate is one that suits the
    small networks of all ways; that of the MLPs on the full sets is the paper's, as eight layers need a small one.

    Args:
        subject: what is pruned.
        data_dir: folder of the official files, which the embedded images do not need.
        epochs: ``epochs``, ``noise_epochs`` or ``fine_tune_epochs``, where they are to be other than usual.
    """
    embedded = subject.data == EMBEDDED
    names = ("epochs", "noise_epochs", "fine_tune_epochs")
    usual = (8, 3, 12) if embedded else (5, 1, 6)
    schedule: dict[str, Any] = dict(zip(names, usual, strict=True)) | epochs
    return TrainConfig(
        data=subject.data,
        data_dir=None if embedded else data_dir,
        model=subject.network,
        seed=subject.seed,
        device="cpu",
        lr=_learning_rate(subject),
        batch_size=32 if embedded else 128,
        noise_lr=5e-2 if embedded else 1e-1,
        **schedule,
    ).resolved()


def _learning_rate(subject: Subject) -> float:
    if subject.data == EMBEDDED:
        return 3e-3
    return PAPER_SETTINGS[subject.network, subject.data].lr if subject.network == "mlp" else 4e-3


class ChainComparison(Comparison):
    """All ways for a network of linear and convolution layers, each reading the one before it."""

    def ways(self) -> Iterator[tuple[str, str, Way]]:
        """Return size, name and way of each network, the most informative ones first."""
        yield "dense", "dense", self.dense
        yield "dense", "trained", lambda: Built(self.trained, {}, self.config.settings.epochs)
        for size in SIZES:
            yield size, "bmrs", functools.partial(self._bmrs, size, uniform=False)
            yield size, "scratch", functools.partial(self._scratch, size)
            for method, (criterion, everywhere) in RIVALS.items():
                if everywhere and size == "own":
                    continue  # the widths are given
                yield size, method, functools.partial(self._rival, size, criterion, everywhere)
            if size != "own":
                yield size, "bmrs, uniform", functools.partial(self._bmrs, size, uniform=True)
                yield size, "paper's training, uniform", functools.partial(self._paper, size)
                for method, criterion in IN_ROUNDS.items():
                    yield size, method, functools.partial(self._in_rounds, size, criterion)
            if size != "own" and self.subject.data == EMBEDDED:
                for method in WEIGHT_RATES:
                    yield size, method, functools.partial(self._weights_trained, size, method)

    # What the ways have in common, made once.

    @property
    def layers(self) -> Sequence[str]:
        """Names of the layers whose outputs can be pruned."""
        return self.chain.names

    @functools.cached_property
    def chain(self) -> Chain:
        """The dense network's layers."""
        return Chain.of(recipe.untrained(self.config, self.data, CPU), self.data.test.examples(1))

    @functools.cached_property
    def evidence(self) -> list[Tensor]:
        """How much the likelihood loses without each structure of a layer, to second order: T/2·SNR² nats."""
        prices = bmrs.structure_prices(
            recipe.noisy_state(self.trained, self.config, self.data, CPU).model,
            self.data.train.examples(1),
            exponent=self.config.price_exponent or 0.0,
        )
        return [
            0.5 * prices[name] * bmrs.SNR()(layer).scores.cpu() ** 2
            for name, layer in noise_layers(self.noisy).items()
        ]

    @functools.cached_property
    def examples(self) -> Tensor:
        """Training images that structures are chosen and weights are refitted on."""
        return self.data.train.examples(recipe.EXAMPLES)

    @functools.cached_property
    def choice(self) -> ChoiceOfChain:
        """What `bmrs.prune_to` knows of the network with noise."""
        return ChoiceOfChain(self.noisy, self.evidence, self.examples)

    @functools.cached_property
    def rivals_scores(self) -> dict[str, list[Tensor]]:
        """The scores that Torch-Pruning gives."""
        return torch_pruning.scores(self.trained, self.chain.names, self.data.train, seed=self.subject.seed)

    @functools.cached_property
    def paper_noisy(self) -> nn.Module:
        """A network trained with noise and the paper's KL weight for as long as training and noise take here."""
        settings = self.config.settings
        assert settings.noise_epochs is not None, "settings have it for this recipe"
        config = TrainConfig(
            recipe="paper",
            mode="post-training",
            data=self.config.data,
            data_dir=self.config.data_dir,
            model=self.config.model,
            seed=self.config.seed,
            device="cpu",
            epochs=settings.epochs + settings.noise_epochs,
            fine_tune_epochs=0,
            batch_size=settings.batch_size,
            granularity="sample",
        ).resolved()
        state = algorithm1.new_state(config, self.data, noise=True, device=CPU)
        algorithm1.train(state, self.data, config, save=nothing, progress=self.deadline)
        for layer in noise_layers(state.model).values():
            layer.set_kept(torch.ones_like(layer.mask))  # the size decides how many stay
        return state.model

    # The ways.

    def _bmrs(self, size: str, *, uniform: bool) -> Built | None:
        model = self.chosen(size, uniform=uniform)
        if model is None:
            return None
        before = {
            "pruned": accuracy(bmrs.compact(model, self.examples), self.data.test),
            "refitted": accuracy(bmrs.compact(model, self.examples, refit_to=self.trained), self.data.test),
        }
        start = recipe.start_of_fine_tuning(model, self.trained, self.config, self.data)
        return Built(
            self.fit(start, self._tuning_epochs), before, recipe.total_epochs(self.config, self.data)
        )

    def chosen(self, size: str, *, uniform: bool) -> nn.Module | None:
        """Return the network with noise, with masks as this recipe has them; None if there is none of that size."""
        widths = self._uniform(size) if uniform else self.own_widths(size)
        if widths is None:
            return None
        return masked_to(self.noisy, self.evidence, widths) if size == "own" else self.choice.masked(widths)

    def _scratch(self, size: str) -> Built | None:
        widths = self.own_widths(size)
        if widths is None:
            return None
        examples = self.data.train.examples(2)
        same = bmrs.compact(masked_to(self.noisy, self.evidence, widths), examples)
        epochs = recipe.total_epochs(self.config, self.data)
        return Built(self.fit(recipe.untrained_copy(same, self.config), epochs), {}, epochs)

    def _rival(self, size: str, criterion: str, everywhere: bool) -> Built | None:
        stay = self.kept_by_rival(size, criterion, everywhere)
        if stay is None:
            return None
        start = torch_pruning.pruned(self.trained, stay, self.data.train.examples(2))
        before = {"pruned": accuracy(start, self.data.test)}
        epochs = recipe.total_epochs(self.config, self.data)
        return Built(self.fit(start, epochs - self.config.settings.epochs), before, epochs)

    def kept_by_rival(self, size: str, criterion: str, everywhere: bool) -> dict[str, Tensor] | None:
        """Return the structures that stay of each layer, by Torch-Pruning's scores; None if none have that size."""
        scores = self.rivals_scores[criterion]
        if everywhere:
            widths = self.chain.best([kept(each) for each in scores], self.chain.cost(self._uniform(size)))
        else:
            widths = self.own_widths(size) if size == "own" else self._uniform(size)
        if widths is None:
            return None
        return {
            name: _best(each, width)
            for name, each, width in zip(self.chain.names, scores, widths, strict=True)
        }

    def _in_rounds(self, size: str, criterion: str) -> Built:
        epochs = recipe.total_epochs(self.config, self.data)
        model = torch_pruning.pruned_in_rounds(
            self.trained,
            dict(zip(self.chain.names, self._uniform(size), strict=True)),
            criterion,
            self.data.train,
            epochs=in_rounds(epochs - self.config.settings.epochs),
            train=self.fit_in_place,
        )
        return Built(model, {}, epochs)

    def _paper(self, size: str) -> Built:
        layers = noise_layers(self.paper_noisy).values()
        scores = [-bmrs.BMRSNormal()(layer).scores.cpu() for layer in layers]
        model = masked_to(self.paper_noisy, scores, self._uniform(size))
        start = bmrs.compact(model, self.data.train.examples(2))
        before = {"pruned": accuracy(start, self.data.test)}
        epochs = self.config.settings.fine_tune_epochs
        return Built(self.fit(start, epochs), before, recipe.total_epochs(self.config, self.data))

    def _weights_trained(self, size: str, method: str) -> Built:
        model = self._noisy_with_weights(WEIGHT_RATES[method])
        scores = [bmrs.SNR()(layer).scores.cpu() for layer in noise_layers(model).values()]
        start = bmrs.compact(
            masked_to(model, scores, self._uniform(size)), self.data.train.examples(recipe.EXAMPLES)
        )
        before = {"pruned": accuracy(start, self.data.test)}
        epochs = recipe.total_epochs(self.config, self.data)
        return Built(self.fit(start, self.config.settings.fine_tune_epochs), before, epochs)

    @functools.cache  # noqa: B019 - as long as the comparison lives
    def _noisy_with_weights(self, share: float) -> nn.Module:
        """The trained network with posteriors that were learned while its weights went on training."""
        settings, train = self.config.settings, self.data.train
        state = recipe.noisy_state(self.trained, self.config, self.data, CPU)
        prices = bmrs.structure_prices(
            state.model, train.examples(1), exponent=self.config.price_exponent or 0.0
        )
        learner = PosteriorLearner(
            state.model,
            temperature=settings.temperature or 1.0,
            dataset_size=len(train),
            learning_rate=settings.noise_lr,
            prices=prices,
            weight_lr=share * settings.lr,
        )
        with learner:
            for _ in range(recipe.noise_epochs(self.config, self.data)):
                for images, labels in train.batches(batches_of(state, train, self.config)):
                    self.deadline.check()
                    learner.step(F.cross_entropy(state.model(images), labels))
        return state.model

    def own_widths(self, size: str) -> tuple[int, ...] | None:
        """Return this recipe's widths, None if there are none of that size."""
        if size != "own":
            gains = [minus_losses(losses) for losses in self.choice.losses]
            return self.chain.best(gains, self.chain.cost(self._uniform(size)))
        stay = [int((~bmrs.BMRSOdds()(layer).prune).sum()) for layer in noise_layers(self.noisy).values()]
        return tuple(max(1, count) for count in stay)

    def _uniform(self, size: str) -> tuple[int, ...]:
        return self.chain.uniform(float(size.removesuffix("%")) / 100)

    @property
    def _tuning_epochs(self) -> int:
        # Noise that settled early does not get longer fine-tuning here, so that all rows of a size compare.
        return self.config.settings.fine_tune_epochs


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def masked_to(model: nn.Module, scores: Sequence[Tensor], widths: Sequence[int]) -> nn.Module:
    """Return a copy of a noisy model that keeps, in each layer, so many structures with the highest scores."""
    model = copy.deepcopy(model)
    for layer, each, width in zip(noise_layers(model).values(), scores, widths, strict=True):
        layer.set_kept(torch.zeros_like(layer.mask).index_fill_(0, _best(each, width), True))
    return model


class ChoiceOfChain:
    """How many structures of each layer go, and which ones, as `bmrs.prune_to` has it with ``examples``.

    Args:
        model: a chain with noise.
        scores: of each layer's structures, which say the one that stays in any case.
        examples: training images.
    """

    def __init__(self, model: nn.Module, scores: Sequence[Tensor], examples: Tensor) -> None:
        self._model = masked_to(model, scores, [len(each) for each in scores])
        graph = MaskedGraph(self._model, as_inputs(examples[:2]), "peers")
        base = graph.without()
        units: dict[str, dict[int, Unit]] = defaultdict(dict)
        for unit in graph.units(base):
            units[unit.structures[0].layer][unit.structures[0].number] = unit
        self._groups = [
            [units[name][number] for number in each.argsort(stable=True).tolist()][:-1]
            for name, each in zip(noise_layers(self._model), scores, strict=True)
        ]
        self._joint = JointChoice(graph, base, as_inputs(examples))

    @functools.cached_property
    def losses(self) -> Sequence[NDArray[np.float64]]:
        """What the network loses with each structure of each layer that goes."""
        losses = self._joint.rises(self._groups)
        assert losses is not None, "linear and convolution layers read all of a chain"
        return losses

    def masked(self, widths: Sequence[int]) -> nn.Module:
        """Return a copy of the model with so many structures in each layer."""
        model = copy.deepcopy(self._model)
        numbers = [len(group) + 1 - width for group, width in zip(self._groups, widths, strict=True)]
        orders = self._joint.order(self._groups, numbers)
        layers = noise_layers(model).values()
        for layer, group, order, number in zip(layers, self._groups, orders, numbers, strict=True):
            going = range(number) if order is None else order[:number]
            gone = torch.tensor([group[place].structures[0].number for place in going], dtype=torch.int64)
            layer.set_kept(torch.ones_like(layer.mask).index_fill(0, gone, False))
        return model
