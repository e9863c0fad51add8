"""The networks that the options name, with and without noise."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bmrs import processes
from bmrs.checks import one_line
from bmrs.data import Dataset
from bmrs.models import (
    MLP,
    NETWORKS,
    LeNet5,
    NoisePlace,
    build_network,
    load_weights,
    network_from,
    place_noise,
)
from bmrs.training.config import TrainConfig
from bmrs.training.images import image_size
from bmrs.training.run_folder import RunError


def dense_network(config: TrainConfig, data: Dataset) -> nn.Module:
    """Return the untrained network that the options name, for the images and classes of the data.

    Raises:
        RunError: it cannot be built, or does not take the images to their classes.
    """
    if config.is_sequence:
        network = _fused(config, data, noise=False)
        _check_outputs(network, data.train.examples(2).cpu(), config, data)
        return network
    channels, height, width = data.train.image_shape
    if height != width:
        raise RunError(
            f"--model {config.model} needs square images, but those of {data.name} are {height}×{width}"
        )
    try:
        if ":" in config.model:
            network = network_from(
                config.model, num_classes=data.num_classes, in_channels=channels, image_size=height
            )
        else:
            network = build_network(
                config.model, num_classes=data.num_classes, in_channels=channels, image_size=height
            )
    except (TypeError, ValueError) as error:
        raise RunError(f"--model {config.model}: {one_line(error)}") from error
    _check_outputs(network, data.train.examples(2).cpu(), config, data)
    return network


def noisy_network(config: TrainConfig, data: Dataset) -> nn.Module:
    """Return the same network with noise layers; with the same random numbers it has the same weights.

    Raises:
        RunError: as `dense_network`, or noise cannot be where the options want it.
    """
    if config.is_sequence and config.noise_on in ("inner", "paper"):
        return _fused(config, data, noise=True)
    network = dense_network(config, data)
    try:
        return place_noise(
            network,
            _placement(config),
            granularity=config.settings.granularity,
            example_inputs=data.train.examples(2).cpu(),
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"--noise-on {config.noise_on}: {one_line(error)}") from error


def with_weights(network: nn.Module, config: TrainConfig) -> nn.Module:
    """Return a network with the weights that the options name, if any.

    Raises:
        RunError: the file is missing or broken, or holds the weights of another network.
    """
    if config.weights is None:
        return network
    try:
        load_weights(network, config.weights, new_classifier=config.new_classifier)
    except OSError as error:
        raise RunError(f"--weights: {one_line(error)}") from error
    except ValueError as error:
        raise RunError(f"--weights: {one_line(error)}{_hint(config)}") from error
    return network


def _hint(config: TrainConfig) -> str:
    """Return what may help where weights do not fit, to be added to a message."""
    hints = [] if config.new_classifier else ["weights for other classes need --new-classifier true"]
    network = NETWORKS.get(config.model)
    if network is not None and image_size(config) != network.image_size:
        hints.append(f"published weights of {config.model} mostly need --image-size {network.image_size}")
    return "".join(f"; {hint}" for hint in hints)


def check_training(network: nn.Module, config: TrainConfig, data: Dataset) -> None:
    """Check that a network can be trained on the smallest part that an epoch's batches come in.

    In training mode networks may give other outputs, and batch norms want several values of each channel.

    Raises:
        RunError: it cannot; the message says why.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RunError(f"--model {config.model} has no parameters to train: all of them are frozen")
    images = data.train.examples(min(2, _smallest_part(len(data.train), config))).cpu()
    try:
        processes.check_statistics(network)
    except ValueError as error:
        raise RunError(f"--model {config.model} goes with one process only: {error}") from error
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = copy.deepcopy(network).train()(images)
    except Exception as error:  # it may be of the user's own
        part = f"a part of a batch that has {len(images)} image{'s' * (len(images) > 1)}"
        hint = "; take another --batch-size or --accumulate" if len(images) == 1 else ""
        raise RunError(
            f"--model {config.model} cannot be trained on {part}: {one_line(error)}{hint}"
        ) from error
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape != (len(images), data.num_classes):
        raise RunError(
            f"--model {config.model} gives {shape} in training mode, expected logits of shape "
            f"{(len(images), data.num_classes)} as in evaluation mode"
        )


def _smallest_part(images: int, config: TrainConfig) -> int:
    batch_size = config.settings.batch_size
    wholes = {min(images, batch_size), images % batch_size} - {0}
    # What `Tensor.tensor_split` makes of each, the empty parts left out.
    return min(max(1, max(1, whole // processes.count()) // config.accumulate) for whole in wholes)


def example_of_ties(config: TrainConfig, data: Dataset) -> Tensor | None:
    """Return images to find out with which noise layers have to prune together, None where none do."""
    return None if config.is_sequence else data.train.examples(2)


def _placement(config: TrainConfig) -> str | tuple[NoisePlace | str, ...]:
    assert config.noise_on is not None, "filled in"
    if config.noise_on == "suggest":
        return "suggest"
    if config.noise_on in ("inner", "paper"):
        return NETWORKS[config.model].placements[config.noise_on]
    return tuple(pattern.strip() for pattern in config.noise_on.split(","))


def _check_outputs(network: nn.Module, images: Tensor, config: TrainConfig, data: Dataset) -> None:
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad():
            outputs = network.eval()(images)
    except Exception as error:  # it may be of the user's own
        known = NETWORKS.get(config.model)
        hint = ""
        if known is not None and config.image_size not in (None, known.image_size):
            hint = f"; it is meant for --image-size {known.image_size}"
        raise RunError(
            f"--model {config.model} does not take images of shape {tuple(images.shape[1:])}: {one_line(error)}{hint}"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape != (len(images), data.num_classes):
        raise RunError(
            f"--model {config.model} gives {shape} for {len(images)} images, expected logits of shape "
            f"{(len(images), data.num_classes)}"
        )


def _fused(config: TrainConfig, data: Dataset, *, noise: bool) -> nn.Module:
    channels, height, width = data.train.image_shape
    granularity = config.settings.granularity
    if config.model == "lenet5":
        return LeNet5(
            in_channels=channels, num_classes=data.num_classes, noise=noise, granularity=granularity
        )
    num_blocks, hidden = config.settings.num_blocks, config.settings.hidden
    assert num_blocks is not None, "settings have it for every MLP"
    assert hidden is not None, "settings have it for every MLP"
    return MLP(
        in_features=channels * height * width,
        num_blocks=num_blocks,
        hidden=hidden,
        num_classes=data.num_classes,
        noise=noise,
        granularity=granularity,
    )
