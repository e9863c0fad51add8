"""The states that random numbers come from, as they were before a network runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bmrs.graph.inputs import Inputs


@contextmanager
def random_states_kept(network: nn.Module, inputs: Inputs, *, seed: int | None = None) -> Iterator[None]:
    """Leave the random numbers of torch, on the devices in use, of numpy and of Python as they are.

    Args:
        network: what runs.
        inputs: what it runs on.
        seed: what these numbers start from meanwhile; None to go on from where they are.
    """
    tensors = [*network.parameters(), *network.buffers(), *tree_flatten(inputs)[0]]
    devices = {tensor.device for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_cuda}
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that the user has
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            if seed is not None:
                # Not torch.manual_seed, which seeds all devices.
                torch.default_generator.manual_seed(seed)
                for device in devices:
                    torch.cuda.default_generators[device.index].manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
