"""The losses that posteriors are learned from: whether they can teach the noise anything, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from bmrs.checks import shown

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]


def checked_summands(
    loss: Tensor | Iterable[Tensor], parameters: Collection[Tensor], *, can_be_seen: bool
) -> Iterator[Tensor]:
    """Return the summands of a loss, one of which at least has to depend on the noise.

    Args:
        loss: one number, or its summands.
        parameters: those of the noise.
        can_be_seen: whether autograd has these parameters themselves; of sharded ones it has others.

    Raises:
        TypeError: it is neither a tensor nor several.
        ValueError: one is not a single number, or nothing leads from any of them to the noise.
    """
    if not isinstance(loss, Tensor | Iterable):
        raise TypeError(f"loss must be a tensor that the model's outputs lead to, got {shown(loss)}")
    depends = False
    for part in [loss] if isinstance(loss, Tensor) else loss:
        if not isinstance(part, Tensor):
            raise TypeError(f"loss must be a tensor that the model's outputs lead to, got {shown(part)}")
        if part.numel() != 1:
            raise ValueError(
                f"loss must be one number, the mean over the batch, got shape {tuple(part.shape)}"
            )
        depends = depends or (part.requires_grad and (not can_be_seen or leads_to(part, parameters)))
        if depends or not isinstance(loss, Tensor):  # several can be told after the last one alone
            yield part
    if not depends:
        raise ValueError(
            "loss does not depend on the noise that is to be learned, so that the KL term alone would decide: "
            "compute it from the model that it is called with, without detach, item or torch.no_grad"
        )


def leads_to(value: Tensor, parameters: Collection[Tensor]) -> bool:
    """Return whether autograd goes from a value to one of some parameters, as far as can be seen.

    Functions written in Python may have graphs of their own in them, as those of activation checkpointing have.
    """
    wanted = {id(parameter) for parameter in parameters}
    nodes: list[Any] = [value.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and not _is_our_own(node):
            return True
        if id(getattr(node, "variable", None)) in wanted:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def _is_our_own(node: BackwardCFunction) -> bool:
    module: str = type(node)._forward_cls.__module__  # type: ignore[attr-defined]
    return module.startswith("bmrs_kernels.")


def backward(loss: Tensor | Iterable[Tensor], term: Tensor) -> None:
    """Compute the gradients of a loss, or one after another of its summands, plus a term."""
    for number, part in enumerate([loss] if isinstance(loss, Tensor) else loss):
        # In one pass with the first, as DistributedDataParallel expects one for each forward pass.
        (part if number else part + term).backward()
