"""Finding the first NaN or infinity of a training, without waiting for the device at every step."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bmrs import processes


class NonFiniteError(ArithmeticError):
    """Training met a NaN or an infinity; the message names the epoch, the step and the place."""


class FiniteWatch:
    """Records, on the device, a probe of every layer's output and gradient at each step.

    As a context manager, for one epoch at a time, it hooks into the layers that have parameters of their own.
    `probes` and `record` add one step without synchronising; `check` looks at all the steps since the last check at
    once.

    Args:
        model: the model under training.
        outputs: False to leave out what layers put out, into which a compiled network allows no look.
    """

    def __init__(self, model: nn.Module, *, outputs: bool = True) -> None:
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if outputs and next(module.parameters(recurse=False), None) is not None
        }
        self._parameters = dict(model.named_parameters())
        self._places = [
            *(f"the output of layer {name!r}" for name in self._layers),
            *(f"the gradient of {name!r}" for name in self._parameters),
            "the loss",
        ]
        self._outputs: dict[nn.Module, Tensor] = {}
        self._rows: list[Tensor] = []
        self._steps = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> FiniteWatch:
        self._rows.clear()
        self._steps = 0
        self._handles = [layer.register_forward_hook(self._see_output) for layer in self._layers.values()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def probes(self, loss: Tensor) -> Tensor:
        """Return those of the step whose forward and backward passes have just been run, shape (places,)."""
        # A layer whose forward was not called, because another one uses its parameters, has put out nothing.
        outputs = [self._outputs.get(layer, loss.new_zeros(())) for layer in self._layers.values()]
        gradients = [
            loss.new_zeros(()) if parameter.grad is None else _probe(parameter.grad)
            for parameter in self._parameters.values()
        ]
        self._outputs.clear()
        return torch.stack([probe.to(loss.dtype) for probe in (*outputs, *gradients, loss.detach())])

    def record(self, probes: Tensor) -> None:
        """Note a step's probes."""
        self._rows.append(probes)

    def check(self, epoch: int) -> None:
        """Look at the steps since the last check; synchronises once.

        Raises:
            NonFiniteError: one of them had a NaN or an infinity, on any process; it is raised on all.
        """
        wrong = processes.any_of(~torch.stack(self._rows).isfinite())
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise NonFiniteError(_message(epoch, self._steps + row + 1, self._places[column]))
        self._steps += len(self._rows)
        self._rows.clear()

    def check_parameters(self, epoch: int) -> None:
        """Check the parameters as the last step left them.

        Raises:
            NonFiniteError: one of them holds a NaN or an infinity.
        """
        probes = torch.stack([_probe(parameter) for parameter in self._parameters.values()])
        wrong = processes.any_of(~probes.isfinite())
        if wrong.any():
            name = list(self._parameters)[int(wrong.nonzero()[0])]
            raise NonFiniteError(_message(epoch, self._steps, f"parameter {name!r}"))

    def _see_output(self, layer: nn.Module, inputs: object, output: object) -> None:
        # Attention and recurrent layers return tuples; of those with several tensors the first is the one that counts.
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.is_floating_point():
            self._outputs[layer] = _probe(first)


def _probe(values: Tensor) -> Tensor:
    """Return the mean of the least and the largest value: finite exactly where all values are, without overflow."""
    # One pass; an infinity norm takes ten times as long on a CPU.
    least, largest = values.detach().aminmax()
    return (least / 2).add(largest, alpha=0.5)


def _message(epoch: int, step: int, place: str) -> str:
    return f"NaN or infinity at epoch {epoch}, step {step}: first seen in {place}"
