"""What a network does in training mode alone, which a compacted one, found in evaluation mode, may not do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_structure

from bmrs import processes
from bmrs.compaction.comparison import in_one_line
from bmrs.graph.copies import copied
from bmrs.graph.inputs import Inputs, map_tensors
from bmrs.graph.operators import DROPOUTS
from bmrs.graph.random_states import random_states_kept
from bmrs.graph.stock_layers import BATCH_NORMS


def only_in_training(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Return what of a model's training mode is not in a graph of what it does in evaluation mode.

    Batch norms and dropout are layers of such a graph. Named are other random numbers, buffers that training changes,
    and outputs that training alone has; whatever else its code does where ``training`` is True is not seen.

    Args:
        model: in which noise is marked. A copy runs, in both modes, with random states kept; what its code changes
            elsewhere, as in a log of the program's, is changed.
        inputs: the example.

    Returns:
        Each with its place, as parts of a sentence; nothing of a model that does not run on the example in training
        mode, as with a batch norm and a single example, nor with several processes, which may wait for each other.
    """
    if processes.count() > 1:
        return ()
    network = copied(model, share="parameters")
    _alias_parameters(network)
    drawn: dict[bool, dict[str, None]] = {False: {}, True: {}}
    structures = []
    with torch.no_grad(), random_states_kept(network, inputs):
        for training in (False, True):
            network.train(training)
            buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
            try:
                with (
                    _named_layers(network) as path,
                    _Draws(network, path, drawn[training]) as draws,
                    draws.dropouts,
                ):
                    structures.append(tree_structure(_run(network, inputs)))
            except _WritesParameterError:
                return ("what training writes into parameters",)
            except (Exception, SystemExit):
                return ()
    found = [what for what in drawn[True] if what not in drawn[False]]
    for name, buffer in network.named_buffers():
        layer = network.get_submodule(name.rpartition(".")[0])
        before = buffers.get(name)
        if not isinstance(layer, BATCH_NORMS) and (before is None or not torch.equal(before, buffer)):
            found.append(f"what training keeps in {name!r}")
    if structures[0] != structures[1]:
        found.append("outputs that it has in training mode alone")
    return tuple(found)


def failure_in_training(model: nn.Module, compacted: nn.Module, inputs: Inputs) -> str:
    """Return the error that a compacted network of the user's classes ends in in training mode, as text.

    Parts that evaluation mode does not use keep their sizes, where what they read became smaller.

    Args:
        model: what it was made of, in which noise is marked. Copies of both run, as for `only_in_training`.
        compacted: the network.
        inputs: the example.

    Returns:
        "" if it runs, if the model does not run either, or if that cannot be tried, as with several processes.
    """
    if processes.count() > 1:
        return ""
    failures = []
    for each in (model, compacted):
        network = copied(each, share="parameters").train()
        _alias_parameters(network)
        with torch.no_grad(), random_states_kept(network, inputs):
            try:
                with _named_layers(network) as path, _Draws(network, path, {}) as draws, draws.dropouts:
                    _run(network, inputs)
                failures.append("")
            except _WritesParameterError:
                return ""
            except (Exception, SystemExit) as error:
                failures.append(in_one_line(error))
    of_model, of_compacted = failures
    return "" if of_model else of_compacted


class _WritesParameterError(Exception):
    """Code of a model writes into a parameter, which a copy that takes no memory shares with it."""


def _alias_parameters(network: nn.Module) -> None:
    """Give a network parameters of its own with the values of others, so that it can put other values into them."""
    aliases = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in network.parameters()}
    for layer in network.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[name] = aliases[id(parameter)]


def _run(network: nn.Module, inputs: Inputs) -> Any:
    args, kwargs = map_tensors(torch.clone, inputs)
    return network(*args, **kwargs)


@contextmanager
def _named_layers(network: nn.Module) -> Iterator[list[str]]:
    """Keep a list of the names of the layers that are being called, the innermost one last."""
    path: list[str] = []
    hooks = []
    for name, layer in network.named_modules():

        def enter(layer: nn.Module, inputs: Any, name: str = name) -> None:
            path.append(name)

        def leave(layer: nn.Module, inputs: Any, outputs: Any) -> None:
            path.pop()

        hooks.append(layer.register_forward_pre_hook(enter))
        hooks.append(layer.register_forward_hook(leave))
    try:
        yield path
    finally:
        for hook in hooks:
            hook.remove()


class _Draws(TorchDispatchMode):
    """Notes operations that draw random numbers, but for those of dropout, and stops those that write parameters."""

    def __init__(self, network: nn.Module, path: list[str], found: dict[str, None]) -> None:
        super().__init__()
        self._path, self._found = path, found
        self._parameters = {p.untyped_storage().data_ptr() for p in network.parameters() if p.numel()}
        self.dropouts = _Dropouts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable and self._writes_parameter(func, args):
            raise _WritesParameterError
        if self.dropouts.inside or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        before = self._state(args)
        result = func(*args, **kwargs)
        if not torch.equal(before, self._state(args)):
            name = func._schema.name.split("::")[1].strip("_")
            layer = self._path[-1] if self._path else ""
            place = f" in layer {layer!r}" if layer else ""
            self._found[f"random numbers of {name}{place}"] = None
        return result

    def _writes_parameter(self, func: Any, args: Any) -> bool:
        written = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        tensors = [leaf for leaf in tree_flatten(written)[0] if isinstance(leaf, Tensor)]
        return any(tensor.untyped_storage().data_ptr() in self._parameters for tensor in tensors)

    @staticmethod
    def _state(args: Any) -> Tensor:
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


# The functions of torch.nn.functional call the operators of these names.
_OF_DROPOUT = re.compile(f"({'|'.join(DROPOUTS)})(_|[123]d)?")


class _Dropouts(TorchFunctionMode):
    """Knows whether one of torch's functions for dropout is being computed."""

    inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_dropout = _OF_DROPOUT.fullmatch(getattr(func, "__name__", "")) is not None
        self.inside += of_dropout
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside -= of_dropout
