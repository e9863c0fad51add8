"""Training steps with noise against the same network without: ``python -m benchmarks step``.

A step is forward, loss, backward and Adam. The loss is the cross entropy, with noise plus the KL term. All ways of a
network take turns, and a ratio is that of a way's time to the time of the network without noise layers, in the same
mode. On a CPU, smaller networks stand in for the large ones, and their names say so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bmrs
from benchmarks import records
from benchmarks.environment import environment, one_line
from benchmarks.granularities import GRANULARITIES, distinct
from benchmarks.markdown import table
from benchmarks.options import add_device_and_record, positive
from benchmarks.rivals import plain_layer
from benchmarks.speed.authors_layers import use_authors_layers
from benchmarks.speed.function_cases import DTYPES
from benchmarks.speed.networks import TimedNetwork, trained_networks
from benchmarks.speed.stopwatch import (
    Plan,
    Stopwatch,
    capture,
    kept,
    peak_bytes_on_cpu,
    ratio,
    summary,
)
from bmrs import compat
from bmrs.noise.lookup import noise_layers
from bmrs_kernels.dispatch.backend import resolve_backend
from bmrs_kernels.options import Backend, Granularity

SUITE = "step"
MODES = ("eager", "compiled", "cuda graph")
# Rows of other settings stay in the file, so that several commands can measure what takes too long for one.
SETTING = ("network", "dtype", "mode")
ROUNDS = 5
ROUND_MS = 150.0  # of one way before the next one's turn
# Small, so that the posteriors stay as at the start of a training: otherwise the plain formulas soon give NaN.
LEARNING_RATE = 1e-6

Divergence = Callable[[nn.Module], Tensor]


class Way(NamedTuple):
    """How a network is trained, as a row names it."""

    name: str
    granularity: Granularity | None = None
    backend: Backend = "auto"


NO_NOISE = Way("no noise")
AUTHORS_LAYERS = "project, authors' layers"
RECOMPUTED = "project, recomputed"
Key = tuple[Way, str]  # with the mode


class TimedStep:
    """A training step on one batch; a call runs it and returns the loss.

    Args:
        model: what is trained, on the device of the batch.
        divergence: the KL term of the loss, or None.
        batch: inputs and labels.
        dtype: bfloat16 runs the model under autocast.
        graphable: whether the step is to be captured in a CUDA graph.
        compiled: whether torch.compile gets the model and the loss; the optimizer stays as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        divergence: Divergence | None,
        batch: tuple[Tensor, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        graphable: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model, self.divergence, self.batch, self.dtype = model, divergence, batch, dtype
        self.optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, capturable=graphable)
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def __call__(self) -> Tensor:
        """Train on the batch once and return the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        # A loss with its graph would tie the next step's gradients to the stream of this call.
        return loss.detach()

    @property
    def bytes_held(self) -> int:
        """Memory of the parameters, the buffers and the optimizer."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *self.model.buffers(), *filter(torch.is_tensor, states)]
        return sum(tensor.nbytes for tensor in tensors)

    def _loss(self) -> Tensor:
        inputs, labels = self.batch
        narrow = self.dtype != torch.float32
        with torch.autocast(inputs.device.type, self.dtype) if narrow else contextlib.nullcontext():
            loss = F.cross_entropy(self.model(inputs), labels)
        return loss if self.divergence is None else loss + self.divergence(self.model)


def ways_of(
    granularities: Sequence[Granularity], mode: str, device: torch.device, *, recomputes: bool = False
) -> list[Way]:
    """Return the ways that compete in a mode on a device, the one without noise first.

    Since compilations take long, only the first granularity is compiled. The torch path is not, as torch.compile does
    not look into it, and it is not captured in a CUDA graph, as it computes other things for other values of σ. The
    authors' layers of `bmrs.compat` draw at every element. Where the network ``recomputes``, the noise that keeps
    nothing of its input competes too.
    """
    if mode == "compiled":
        return [NO_NOISE, Way("project", granularities[0]), Way("plain", granularities[0])]
    with_torch_path = mode != "cuda graph" and backend_of(Way("project"), device) != "torch"
    ways = [NO_NOISE]
    for granularity in granularities:
        ways.append(Way("project", granularity))
        if recomputes:
            ways.append(Way(RECOMPUTED, granularity))
        if with_torch_path:
            ways.append(Way("project, torch path", granularity, "torch"))
        if mode == "eager" and granularity == "element":
            ways.append(Way(AUTHORS_LAYERS, granularity))
        ways.append(Way("plain", granularity))
    return ways


def step_of(network: TimedNetwork, way: Way, device: torch.device, **options: Any) -> TimedStep:
    """Return the step of a network in one way; all ways start from the same weights and see the same batch.

    Args:
        network: what to train.
        way: how.
        device: where.
        options: those of `TimedStep`.
    """
    torch.manual_seed(0)
    model = network.build(way.granularity, way.backend)
    batch = network.inputs(network.batch, device), network.labels(network.batch, device)
    divergence: Divergence | None = functools.partial(bmrs.kl_divergence, weight="mean")
    if way == NO_NOISE:
        divergence = None
    elif way.name == "plain":
        plain_layer.use_plain_formulas(model, uniforms="torch")
        divergence = functools.partial(plain_layer.kl_divergence, weight="mean", dataset_size=1)
    elif way.name == AUTHORS_LAYERS:
        use_authors_layers(model, batch[0].cpu())
        divergence = functools.partial(compat.calculate_model_kl, averaging="mean")
    elif way.name == RECOMPUTED:
        for layer in noise_layers(model).values():
            layer.recompute = True  # as add_noise does
    model = model.to(device).to(memory_format=network.memory_format)  # type: ignore[call-overload]
    return TimedStep(model, divergence, batch, **options)


class Prepared(NamedTuple):
    """A way that is ready to be timed."""

    plan: Plan
    bytes_held: int  # of parameters, gradients and the optimizer, between steps
    peak_bytes: int  # on top of that, during a step


def prepare(network: TimedNetwork, way: Way, mode: str, stopwatch: Stopwatch, dtype: torch.dtype) -> Prepared:
    """Return a way after its first steps.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    before = allocated(stopwatch)
    step = step_of(
        network,
        way,
        stopwatch.device,
        dtype=dtype,
        graphable=mode == "cuda graph",
        compiled=mode == "compiled",
    )
    call: Callable[[], Any] = step
    loss = step()
    if mode == "cuda graph":
        loss, call = capture(step)
        call()
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}")
    plan = stopwatch.plan(call)
    median = summary([stopwatch.measure(plan, evict=False)])["median"]
    # As in training, launches count; and a slow step is timed in every round too.
    plan = plan._replace(repeats=max(1, round(ROUND_MS / median)), pause_ms=0.0, slow_ms=None)
    if plan.peak_bytes is not None:
        return Prepared(plan, allocated(stopwatch) - before, plan.peak_bytes)
    step.optimizer.zero_grad(set_to_none=True)
    return Prepared(plan, step.bytes_held, peak_bytes_on_cpu(step))


def allocated(stopwatch: Stopwatch) -> int:
    """Return the bytes that tensors occupy on a GPU, 0 on a CPU."""
    return torch.cuda.memory_allocated(stopwatch.device) if stopwatch.on_gpu else 0


def measure_network(
    network: TimedNetwork,
    ways: Sequence[Way],
    mode: str,
    stopwatch: Stopwatch,
    *,
    dtype: str = "float32",
    rounds: int = ROUNDS,
    failures: list[str],
) -> list[dict[str, Any]]:
    """Return a row for each way; those that raise are reported in ``failures`` and left out.

    Args:
        network: what to train.
        ways: how; the first one is what the others are compared with, and must not fail.
        mode: "eager", "compiled" or "cuda graph".
        stopwatch: measures on the device.
        dtype: a name in `DTYPES`.
        rounds: turns that each way gets.
        failures: gets a line for each way that raises.
    """
    prepared: dict[Way, Prepared] = {}
    for way in ways:
        try:
            prepared[way] = prepare(network, way, mode, stopwatch, DTYPES[dtype])
        except Exception as error:
            if way == ways[0]:
                raise
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            failures.append(f"{network.name}, {mode}, {way.name} {way.granularity}: {reason}")
    measured = stopwatch.compare(
        {way: each.plan for way, each in prepared.items()}, rounds=rounds, evict=False
    )
    times = {way: summary(each) for way, each in measured.items()}
    rows = [
        {
            "network": network.name,
            "stand_in": network.stand_in,
            "batch": network.batch,
            "input": list(network.input_shape),
            "channels_last": network.channels_last,
            "granularity": way.granularity,
            "way": way.name,
            "backend": backend_of(way, stopwatch.device),
            "mode": mode,
            "dtype": dtype,
            "milliseconds": kept(times[way]),
            "ratio": ratio(times[way], times[ways[0]]),
            "paper_ratio": network.paper_ratio,
            "peak_memory": memory_ratio(prepared[way], prepared[ways[0]]) if mode != "cuda graph" else None,
        }
        for way in prepared
    ]
    prepared.clear()
    gc.collect()
    if stopwatch.on_gpu:
        torch.cuda.empty_cache()
    return rows


def backend_of(way: Way, device: torch.device) -> str | None:
    """Return which implementation of the project serves a way, None if none does."""
    if not way.name.startswith("project"):
        return None
    return resolve_backend(way.backend, torch.empty(0, device=device))


def memory_ratio(first: Prepared, second: Prepared) -> float:
    """Return the ratio of the most memory that two ways occupy during a step."""
    return (first.bytes_held + first.peak_bytes) / (second.bytes_held + second.peak_bytes)


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the rows."""
    lines = []
    for row in rows:
        times, ratios = row["milliseconds"], row["ratio"]
        lines.append(
            (
                row["network"] + (", channels_last" if row["channels_last"] else ""),
                f"{row['mode']}, {row['dtype']}",
                row["way"] if row["backend"] is None else f"{row['way']} ({row['backend']})",
                row["granularity"] or "",
                f"{times['median']:.2f} ({times['p20']:.2f}–{times['p80']:.2f})",
                f"{ratios['value']:.2f} ({ratios['low']:.2f}–{ratios['high']:.2f})",
                "" if row["peak_memory"] is None else f"{row['peak_memory']:.2f}",
                f"{row['paper_ratio']}" + (" (the whole network)" if row["stand_in"] else ""),
            )
        )
    columns = (
        *("network", "mode", "way", "granularity", "ms (p20–p80)"),
        *("time to no noise (rounds)", "memory to no noise", "paper's time to no noise"),
    )
    return table(columns, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a way could not be measured."""
    options = parsed(arguments)
    device = torch.device(options.device)
    stopwatch = Stopwatch(device)
    about = environment(options.commit, device)
    networks = trained_networks(device, whole=options.whole)
    failures: list[str] = []
    rows: list[dict[str, Any]] = []
    for name in options.networks:
        network = networks[name]
        granularities = distinct(options.granularities, of_matrices=name == "mlp")
        for mode in options.modes:
            ways = ways_of(granularities, mode, device, recomputes=network.recomputes)
            for dtype in options.dtype:
                torch.compiler.reset()
                found = measure_network(
                    network, ways, mode, stopwatch, dtype=dtype, rounds=options.rounds, failures=failures
                )
                rows += found
                # At once, so that it stays if what follows fails.
                if options.record is not None:
                    records.save(SUITE, found, about, options.record, setting=SETTING)
                print(f"{network.name}, {mode}, {dtype}: measured", file=sys.stderr, flush=True)
    print(f"{one_line(about)}\n\n{as_markdown(rows)}")
    if failures:
        print("\nNot measured:\n\n" + "\n".join(f"- {failure}" for failure in failures))
    return int(bool(failures))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    names = tuple(trained_networks(torch.device("cpu")))
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=GRANULARITIES)
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="bfloat16 is autocast"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        type=lambda text: text.replace("-", " "),
        choices=MODES,
        metavar="MODE",
        help="of eager, compiled (by torch.compile) and cuda-graph; default: all on a GPU, eager on a CPU",
    )
    parser.add_argument(
        "--whole", action="store_true", help="the large networks themselves on a CPU too, not their stand-ins"
    )
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="turns of each way (%(default)s)")
    add_device_and_record(parser)
    options = parser.parse_args(arguments)
    if options.modes is None:
        options.modes = MODES if options.device == "cuda" else MODES[:1]
    if options.device == "cpu" and "cuda graph" in options.modes:
        parser.error("--modes cuda-graph needs --device cuda")
    return options


if __name__ == "__main__":
    sys.exit(main())
