"""What the processes of a run have in common: the first one's state of training, checked after each epoch."""

from __future__ import annotations

import torch
from torch import nn

from bmrs import processes
from bmrs.data import Dataset
from bmrs.training.checkpoint import TrainingState
from bmrs.training.run_folder import RunError


def share_state(state: TrainingState) -> None:
    """Give the first process's state of training and of random numbers to all of them.

    Raises:
        RunError: another process has built another network.
    """
    if processes.count() == 1:
        return
    networks, optimizer, order, history = processes.of_first(
        lambda: (
            [{name: tensor.cpu() for name, tensor in each.state_dict().items()} for each in _networks(state)],
            {
                index: {
                    name: value.cpu() if isinstance(value, torch.Tensor) else value
                    for name, value in values.items()
                }
                for index, values in state.optimizer.state_dict()["state"].items()
            },
            state.order.get_state(),
            state.history,
        )
    )
    try:
        for network, values in zip(_networks(state), networks, strict=True):
            network.load_state_dict(values)
    except RuntimeError as error:
        raise RunError(
            f"process {processes.rank()} has built another network than the first: {error}. All processes need the "
            "same versions of everything"
        ) from error
    param_groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": optimizer, "param_groups": param_groups})
    state.order.set_state(order)
    state.history[:] = history
    share_random_state(state.device)


def _networks(state: TrainingState) -> list[nn.Module]:
    return [state.model] if state.average is None else [state.model, state.average]


def share_random_state(device: torch.device) -> None:
    """Set the random number generators of all processes to the first one's state, which is what checkpoints hold.

    Noise stays independent: each process mixes its number into the seeds that it draws.
    """
    if processes.count() == 1:
        return
    torch.set_rng_state(processes.of_first(torch.get_rng_state))
    if device.type == "cuda":
        torch.cuda.set_rng_state(processes.of_first(lambda: torch.cuda.get_rng_state(device)), device)


def check_same_state(state: TrainingState, network: str) -> None:
    """Check that all processes hold the same parameters and masks, to the last bit.

    Raises:
        RunError: they do not.
    """
    if not processes.same_on_all(state.model.state_dict().values()):
        raise RunError(
            f"after epoch {len(state.history)} of network {network!r} the {processes.count()} processes hold different "
            "parameters or masks, and that epoch was not saved: use machines of one kind with the same versions, and "
            "go on with --resume"
        )


def check_same_data(data: Dataset) -> None:
    """Check that all processes have read the same images and labels.

    Raises:
        RunError: they have not.
    """
    splits = (data.train, data.validation, data.test)
    if not processes.same_on_all(each for split in splits for each in split.fingerprint()):
        raise RunError(
            f"the {processes.count()} processes have read different images of {data.name}: --data-dir must hold the "
            "same files on every machine"
        )
