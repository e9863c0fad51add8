"""One step of training, on its own or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import bmrs
from bmrs.data import Split
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.cuda_graph import GraphedStep
from bmrs.training.finite import FiniteWatch

Step: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]


def new_step(
    state: TrainingState, split: Split, config: TrainConfig, watch: FiniteWatch, *, noise: bool
) -> Step:
    """Return a function that trains on the images of given indices and waits for nothing.

    It returns means over the batch, float64 of shape (3,): the negative log likelihood and the KL term in nats and the
    share of images that were classified rightly, with noise by the noisy network; and what `watch` is to record.

    Args:
        state: The network and its optimizer, changed in place.
        split: Preprocessed images.
        config: The options; with `cuda_graph` the step is captured and replayed.
        watch: Is asked for the step's magnitudes.
        noise: Whether the loss has a KL term.
    """
    model, optimizer = state.model, state.optimizer

    def step(batch: Tensor) -> tuple[Tensor, ...]:
        images, labels = split.images[batch], split.labels[batch]
        logits = model(images)
        nll = F.cross_entropy(logits, labels)
        kl = torch.zeros_like(nll)
        if noise:
            kl = bmrs.kl_divergence(model, weight=config.kl_weight, dataset_size=len(split))
        loss = nll + kl
        optimizer.zero_grad()
        loss.backward()
        magnitudes = watch.magnitudes(loss)
        optimizer.step()
        correct = (logits.argmax(dim=1) == labels).double().mean()
        return torch.stack([nll.detach().double(), kl.detach().double(), correct]), magnitudes

    return GraphedStep(step, config.settings.batch_size, state.device) if config.cuda_graph else step
