"""What pruning costs and what it brings: ``python -m benchmarks pruning``.

Times of the KL term and of a pruning decision for a whole ResNet-50, of compaction with half the structures pruned, and
of inference with the dense, the masked and the compacted network, which take turns.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import bmrs
from benchmarks import records
from benchmarks.environment import environment, one_line
from benchmarks.markdown import table
from benchmarks.options import add_device_and_record, positive
from benchmarks.speed.networks import CONVOLUTION_CHAIN, LENET5, MLP, RESNET50, SMALL_RESNET50, TimedNetwork
from benchmarks.speed.stopwatch import Call, Plan, Round, Stopwatch, kept, ratio, summary
from bmrs.criteria import Criterion
from bmrs.noise.lookup import noise_layers

SUITE = "pruning"
ROUNDS = 5
ROUND_MS = 50.0  # of one competitor before the next one's turn
CRITERIA: dict[str, Criterion] = {
    "BMRSNormal()": bmrs.BMRSNormal(),
    "BMRSUniform(p1=8)": bmrs.BMRSUniform(p1=8),
}
# With names of their own, as those of some networks have the batch of a training step in them.
COMPACTED = {
    "MLP": MLP,
    "LeNet-5": LENET5,
    CONVOLUTION_CHAIN.name: CONVOLUTION_CHAIN,
    "ResNet-50, 64²": SMALL_RESNET50,
}
BATCHES = (1, 8, 64)
DENSE = "dense"
KL_TERM = "KL term, forward and backward"


def spread_posteriors(model: nn.Module) -> None:
    """Give a model's noise layers posteriors as after a training: some to keep, some to prune."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in noise_layers(model).values():
            for parameter, low, high in ((layer.mu, -20.0, 0.0), (layer.log_sigma, -5.0, 3.0)):
                draws = torch.rand(layer.num_structures, generator=generator)
                parameter.copy_(low + (high - low) * draws)


def keep_all(model: nn.Module) -> None:
    """Undo all pruning."""
    for layer in noise_layers(model).values():
        layer.set_kept(torch.ones_like(layer.mask))


def prune_half(model: nn.Module) -> None:
    """Prune every other structure of each noise layer."""
    for layer in noise_layers(model).values():
        layer.set_kept(torch.arange(layer.num_structures, device=layer.mask.device) % 2 > 0)


def timed(
    stopwatch: Stopwatch, calls: Mapping[Any, Call], *, rounds: int, before_each: Call = lambda: None
) -> dict[Any, dict[str, Any]]:
    """Return the summary of each call's times; the calls take turns.

    Args:
        stopwatch: measures on the device.
        calls: what to time; each is called before that, too.
        rounds: turns of each.
        before_each: called before each call, untimed.
    """
    # Single calls, timed with their launches.
    plans = {name: Plan(call, 1, pause_ms=0.0, peak_bytes=None, slow_ms=None) for name, call in calls.items()}

    def single(name: Any) -> float:
        before_each()
        return stopwatch.measure(plans[name], evict=False).milliseconds[0]

    repeats = {}
    for name in plans:
        single(name)
        repeats[name] = max(1, round(ROUND_MS / single(name)))
    results: dict[Any, list[Round]] = {name: [] for name in plans}
    for _ in range(rounds):
        for name in plans:
            results[name].append(Round([single(name) for _ in range(repeats[name])], queued=False))
    return {name: summary(each) for name, each in results.items()}


def divergences(network: TimedNetwork, stopwatch: Stopwatch, rounds: int) -> list[dict[str, Any]]:
    """Return a row: the time of a whole network's KL term and its gradients, what it adds to a training step."""
    model = network.build("element", "auto").to(stopwatch.device)
    spread_posteriors(model)
    parameters = [each for layer in noise_layers(model).values() for each in layer.parameters()]

    def kl_with_gradients() -> Any:
        return torch.autograd.grad(bmrs.kl_divergence(model, weight="mean"), parameters)

    times = timed(stopwatch, {KL_TERM: kl_with_gradients}, rounds=rounds)
    return [row_of(KL_TERM, network.name, times[KL_TERM])]


def decisions(network: TimedNetwork, stopwatch: Stopwatch, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each criterion: the time that `bmrs.prune` takes for a whole network."""
    model = network.build("element", "auto").to(stopwatch.device)
    spread_posteriors(model)
    calls = {name: functools.partial(bmrs.prune, model, criterion) for name, criterion in CRITERIA.items()}
    times = timed(stopwatch, calls, rounds=rounds, before_each=functools.partial(keep_all, model))
    return [row_of("decision", network.name, each, criterion=name) for name, each in times.items()]


def half_pruned(network: TimedNetwork, device: torch.device) -> nn.Module:
    """Return a network in evaluation mode whose noise layers have lost every other structure."""
    torch.manual_seed(0)
    model = network.build("element", "auto").to(device).eval()
    prune_half(model)
    return model


def compactions(
    networks: Mapping[str, TimedNetwork], stopwatch: Stopwatch, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each network: the time that `bmrs.compact` takes, its own check of the outputs included."""
    rows = []
    for name, network in networks.items():
        model = half_pruned(network, stopwatch.device)
        call = functools.partial(bmrs.compact, model, network.inputs(1, stopwatch.device))
        rows.append(row_of("compaction", name, timed(stopwatch, {name: call}, rounds=rounds)[name]))
    return rows


def latencies(
    networks: Mapping[str, TimedNetwork], batches: Sequence[int], stopwatch: Stopwatch, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each network, batch and model: the time of a forward pass and the speedup."""
    rows = []
    for name, network in networks.items():
        masked = half_pruned(network, stopwatch.device)
        torch.manual_seed(0)
        models = {
            DENSE: network.build(None, "auto").to(stopwatch.device).eval(),
            "masked": masked,
            "compacted": bmrs.compact(masked, network.inputs(1, stopwatch.device)),
        }
        for batch in batches:
            inputs = network.inputs(batch, stopwatch.device)
            calls = {kind: functools.partial(model, inputs) for kind, model in models.items()}
            with torch.inference_mode():
                times = timed(stopwatch, calls, rounds=rounds)
            rows += [
                row_of("latency", name, each, batch=batch, model=kind, speedup=ratio(times[DENSE], each))
                for kind, each in times.items()
            ]
    return rows


def row_of(kind: str, network: str, times: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a row; what does not belong to its kind is None."""
    return {
        "kind": kind,
        "network": network,
        "criterion": None,
        "batch": None,
        "model": None,
        "milliseconds": kept(times),
        "speedup": None,
        **more,
    }


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the rows."""
    lines = []
    for row in rows:
        times, speedup = row["milliseconds"], row["speedup"]
        lines.append(
            (
                row["kind"],
                row["network"],
                row["criterion"]
                or row["model"]
                or ("half of the structures" if row["kind"] == "compaction" else ""),
                row["batch"] or "",
                f"{times['median']:.3g} ({times['p20']:.3g}–{times['p80']:.3g})",
                f"{speedup['value']:.2f} ({speedup['low']:.2f}–{speedup['high']:.2f})" if speedup else "",
            )
        )
    return table(("", "network", "of", "batch", "ms (p20–p80)", "speedup over dense (rounds)"), lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks pruning", description=__doc__)
    parser.add_argument(
        "--rounds", type=positive, default=ROUNDS, help="turns of each competitor (%(default)s)"
    )
    add_device_and_record(parser)
    options = parser.parse_args(arguments)
    stopwatch = Stopwatch(torch.device(options.device))
    about = environment(options.commit, options.device)
    rows = [
        *divergences(RESNET50, stopwatch, options.rounds),
        *decisions(RESNET50, stopwatch, options.rounds),
        *compactions(COMPACTED, stopwatch, options.rounds),
        *latencies(COMPACTED, BATCHES, stopwatch, options.rounds),
    ]
    print(f"{one_line(about)}\n\n{as_markdown(rows)}")
    if options.record is not None:
        print(records.save(SUITE, rows, about, options.record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
