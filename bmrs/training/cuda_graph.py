"""A training step as a CUDA graph: recorded once, then replayed, without launching its operations one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from bmrs.data import Batch

ResultT = TypeVar("ResultT")

WARM_UPS = 3
"""Calls before a capture: in them libraries load, kernels are compiled and the optimizer makes its state."""


def warm_up(call: Callable[[], ResultT], stream: torch.cuda.Stream) -> ResultT:
    """Run a call on the stream that it is to be captured on, in turn with the current one, and return its result."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream), warnings.catch_warnings():
        # Of an optimizer, which cannot know that it will be captured soon.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        result = call()
    current.wait_stream(stream)
    return result


def capture(call: Callable[[], ResultT], stream: torch.cuda.Stream) -> tuple[ResultT, Callable[[], None]]:
    """Capture a warmed-up call, which does not run it.

    Args:
        call: waits for nothing on the GPU, and reads and writes the same tensors whenever it is called.
        stream: another one than the current one; replays are on the current one.

    Returns:
        The call's result, without values yet, and a function that computes it in place.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return result, Replay(graph, call)


class Replay:
    """Replays a graph, and keeps alive what was captured: a graph knows the addresses of its tensors and nothing else.

    Args:
        graph: what to replay.
        call: what it was captured from, which holds the tensors that it reads and writes.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, call: Callable[[], Any]) -> None:
        self._graph, self._call = graph, call

    def __call__(self) -> None:
        """Replay the graph once."""
        self._graph.replay()


class GraphedStep:
    """A training step that turns into a CUDA graph after its first calls.

    Each batch is trained on once and in its turn: the first ones, which warm up, and those of another size, such as an
    epoch's incomplete last one, operation by operation. What Python decides in the step is decided once, at the
    capture: the learning rate, for one, stays.

    Args:
        step: trains on a batch and returns tensors.
        batch_size: number of images that the graph is for.
    """

    def __init__(self, step: Callable[[Batch, float], tuple[Tensor, ...]], batch_size: int) -> None:
        self._step = step
        self._batch_size = batch_size
        self._batch: Batch | None = None
        self._stream: Any = None
        self._warm_ups = 0
        self._results: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch, weight: float) -> tuple[Tensor, ...]:
        """Train on a batch; waits for nothing. The weight is 1, as graphs go with one process only."""
        if len(batch.labels) != self._batch_size:
            return self._step(batch, weight)
        if self._batch is None:
            self._batch = Batch(batch.images.clone(), batch.labels.clone())
            self._stream = torch.cuda.Stream(batch.labels.device)
        self._batch.images.copy_(batch.images)
        self._batch.labels.copy_(batch.labels)
        if self._replay is None:
            if self._warm_ups < WARM_UPS:
                self._warm_ups += 1
                return warm_up(self._step_on_buffer, self._stream)
            self._results, self._replay = capture(self._step_on_buffer, self._stream)
        self._replay()
        # The next replay overwrites them.
        return tuple(result.clone() for result in self._results)

    def _step_on_buffer(self) -> tuple[Tensor, ...]:
        assert self._batch is not None, "copied from the first batch"
        return self._step(self._batch, 1.0)
