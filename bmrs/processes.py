"""Several processes that train one model together: what they average and agree on, by torch.distributed.

Where torch.distributed is not in use, or has one process, all of this is what one process would do alone.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

ResultT = TypeVar("ResultT")


class LostProcessError(RuntimeError):
    """Nothing can be exchanged with the other processes any more, as a rule because one of them is gone."""


def count() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if _in_use() else 1


def rank() -> int:
    """Return this process's number, from 0 on."""
    return distributed.get_rank() if _in_use() else 0


def is_first() -> bool:
    """Return whether this is the process that writes, prints and measures."""
    return rank() == 0


def of_first(call: Callable[[], ResultT]) -> ResultT:
    """Let the first process alone call a function, and return its result on all of them.

    The others wait for as long as it takes; where the call raises, they raise `LostProcessError` once the first process
    has ended. The result travels as a pickle.
    """
    if count() == 1:
        return call()
    box: list[Any] = [call() if is_first() else None]
    with _exchange():
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def part_of(batch: Tensor) -> tuple[Tensor, float]:
    """Return this process's part of a batch of all processes, and the weight of its mean.

    The average over the processes of weight times mean is the mean over the whole batch, however uneven the parts are.
    A process that has nothing left takes the first example, with weight 0: the model runs on every process.

    Args:
        batch: indices of examples, shape (N,) with N > 0, the same on all processes.
    """
    processes = count()
    if processes == 1:
        return batch, 1.0
    own = batch.tensor_split(processes)[rank()]
    return (own, len(own) * processes / len(batch)) if len(own) else (batch[:1], 0.0)


def average(values: Tensor) -> Tensor:
    """Return the mean over the processes of a floating tensor of the same shape on each."""
    if count() == 1:
        return values
    total = values.clone()
    _sum(total)
    return total / count()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over the processes, which are the same on all of them to the last bit.

    Not by `DistributedDataParallel`: it fixes at its start which parameters are trained, while learning posteriors
    freezes and thaws them, and the networks are so small that one exchange after the backward pass costs least.
    A parameter that got a gradient on some processes only counts as 0 on the others.

    Args:
        parameters: the same ones in the same order on all processes; those that are frozen are passed over.
    """
    if count() == 1:
        return
    kinds: defaultdict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.requires_grad:
            kinds[parameter.device, parameter.dtype].append(parameter)
    for (device, dtype), alike in kinds.items():
        has_gradient = [parameter.grad is not None for parameter in alike]
        parts = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)
            for parameter in alike
        ]
        total = torch.cat([*parts, torch.tensor(has_gradient, dtype=dtype, device=device)])
        _sum(total)
        means = (total / count()).split([*(len(part) for part in parts), len(alike)])
        for index, (parameter, mean) in enumerate(zip(alike, means, strict=False)):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif means[-1][index]:
                parameter.grad = mean.view_as(parameter).clone()


def any_of(flags: Tensor) -> Tensor:
    """Return where a bool tensor, of the same shape on all processes, is True on any of them."""
    if count() == 1:
        return flags
    highest = flags.to(torch.uint8)
    with _exchange():
        distributed.all_reduce(highest, op=distributed.ReduceOp.MAX)
    return highest.bool()


def same_on_all(tensors: Iterable[Tensor]) -> bool:
    """Return whether all processes hold the same tensors, to the last bit; every process gets the same answer."""
    if count() == 1:
        return True
    tensors = list(tensors)
    digest = hashlib.blake2b(digest_size=7)
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    number = int.from_bytes(digest.digest(), "big")
    # Where they are, since a group of NCCL alone exchanges nothing that is on a CPU.
    extremes = torch.tensor([number, -number], device=tensors[0].device if tensors else None)
    with _exchange():
        distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX)
    highest, negative_lowest = extremes.tolist()
    return highest == -negative_lowest


def check_statistics(model: nn.Module) -> None:
    """Check that no layer would take each process's part of a batch for the whole of it.

    Raises:
        ValueError: with several processes, the model has a batch norm that is none of all processes.
    """
    if count() == 1:
        return
    for name, layer in model.named_modules():
        kind = nn.modules.batchnorm._BatchNorm
        if isinstance(layer, kind) and not isinstance(layer, nn.SyncBatchNorm):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, whose statistics would be those of each of the "
                f"{count()} processes: convert the model with nn.SyncBatchNorm.convert_sync_batchnorm"
            )


def _in_use() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _sum(values: Tensor) -> None:
    with _exchange():
        distributed.all_reduce(values)


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise LostProcessError(
            f"process {rank()} of {count()} cannot reach the others, one of which may have been killed: {reason}"
        ) from error
