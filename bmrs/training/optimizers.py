"""The optimizers of weights that the options name, and how their learning rates go."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.noise.lookup import noise_layers
from bmrs.training.config import TrainConfig


def new_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return an optimizer of all parameters that require gradients; noise has `--noise-lr` and no weight decay."""
    layers = noise_layers(model).values()
    of_noise = [parameter for layer in layers for parameter in layer.parameters()]
    identities = {id(parameter) for parameter in of_noise}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in identities]
    groups: list[dict[str, Any]] = [{"params": weights}]
    decay = config.settings.weight_decay
    if decay:
        # Biases and the scales of normalisations have one dimension.
        groups = [{"params": [p for p in weights if (p.ndim > 1) == decays]} for decays in (True, False)]
        groups[0]["weight_decay"] = decay
    if of_noise:
        groups.append({"params": of_noise, "lr": config.settings.noise_lr})
    groups = [group for group in groups if group["params"]]
    graph = device.type == "cuda" and config.cuda_graph
    # A graph reads the learning rate where it is.
    rate: Any = (
        torch.tensor(config.settings.lr, device=device) if graph and not of_noise else config.settings.lr
    )
    if config.settings.optimizer == "sgd":
        momentum = config.momentum or 0.0
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=True)
    kind = torch.optim.AdamW if config.settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, weight_decay=0.0, fused=True, capturable=graph)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters, where a CUDA graph finds it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scheduled(progress: float, config: TrainConfig) -> float:
    """Return the learning rate in units of `--lr` at a share of the steps in [0, 1), with the warm-up of the options.

    A cosine goes from 2 to 0, so that the mean is that of a constant rate.
    """
    assert config.warm_up is not None, "filled in for the recipe that has it"
    shape = 1 + math.cos(math.pi * progress) if config.schedule == "cosine" else 1.0
    return shape * min(1.0, progress / config.warm_up if config.warm_up else 1.0)
