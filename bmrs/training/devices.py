"""The device that the options of a run name."""

from __future__ import annotations

import os

import torch

from bmrs import processes
from bmrs.checks import one_line
from bmrs.training.config import TrainConfig
from bmrs.training.run_folder import RunError


def device_of(config: TrainConfig) -> torch.device:
    """Return the device that the options name; of several processes on a machine, each takes a GPU of its own.

    Raises:
        RunError: it cannot be used, or not with the other options.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if processes.count() > 1:
        name = _device_of_process(name, config)
    try:
        tried = torch.ones((), device=name)
        tried.item()  # which a device without values, such as "meta", has not
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = one_line(str(error).splitlines()[0])
        raise RunError(f"--device {one_line(name)} cannot be used: {reason}") from error
    device = tried.device
    if config.cuda_graph and device.type != "cuda":
        raise RunError(f"--cuda-graph true needs a GPU, but --device is {device}")
    return device


def _device_of_process(name: str, config: TrainConfig) -> str:
    """Return the device of this one of several processes."""
    together = f"the {processes.count()} processes of this run"
    if config.cuda_graph:
        raise RunError(f"--cuda-graph true goes with one process only, not with {together}")
    if name == "cpu":
        return name
    if name != "cuda":
        raise RunError(f"--device {name} does not go with {together}: expected auto, cpu or cuda")
    # torchrun's number of this process on its machine.
    index, available = int(os.getenv("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= available:
        raise RunError(
            f"--device cuda needs a GPU for each process, but this machine has {available} and a process number "
            f"{index} (counted from 0): lower --nproc-per-node, or take --device cpu"
        )
    torch.cuda.set_device(index)
    return f"cuda:{index}"
