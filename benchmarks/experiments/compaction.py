"""What `bmrs.compact` does to the architectures that people use: ``python -m benchmarks compaction``.

For every network of `benchmarks.experiments.zoo`, with half of its structures pruned at random: what is removed, how
far the outputs are from those of the masked network, how long compaction takes, and how size and time of inference
change. Beside it, where it can follow the network, Torch-Pruning with the same structures of the same layers.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import bmrs
from benchmarks.environment import environment, one_line
from benchmarks.experiments.zoo import ENTRIES, Entry
from benchmarks.markdown import table
from benchmarks.options import positive
from benchmarks.records import RESULTS
from bmrs.noise.lookup import noise_layers

ROUNDS = 15
_DENSITY = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Compact networks, print the table and keep it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compaction", description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(ENTRIES), help="names of networks (default: all)")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "compaction",
        help="folder for rows and table (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=ROUNDS, help="turns of each timing (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.networks if name not in ENTRIES]
    if unknown:
        parser.error(f"networks must be of {', '.join(ENTRIES)}, got {', '.join(unknown)}")
    rows = []
    for name in options.networks:
        for place in ("noise", "heads") if ENTRIES[name].heads else ("noise",):
            rows.append(row(ENTRIES[name], place, rounds=options.rounds))
            print(json.dumps(rows[-1]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(entry)}\n" for entry in rows)
    (options.output / "rows.jsonl").write_text(text, encoding="utf-8")
    words = f"{one_line(environment())}, {torch.get_num_threads()} threads, float32"
    (options.output / "table.md").write_text(f"{words}\n\n{as_table(rows)}\n", encoding="utf-8")
    print(as_table(rows))
    return 0


def row(entry: Entry, place: str, *, rounds: int) -> dict[str, Any]:
    """Compact one network with noise at its usual places or on its attention heads, and measure it."""
    torch.manual_seed(0)
    dense = entry.build().eval()
    model = copy.deepcopy(dense)
    for options in _noise(entry, place):
        bmrs.add_noise(model, **options)
    _prune(model.eval())
    inputs = _inputs(entry, model)
    found: dict[str, Any] = {"network": entry.name, "noise": "heads" if place == "heads" else "channels"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        try:
            compacted = bmrs.compact(model, inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            return {**found, "form": "refused", "because": str(error)}
        found["seconds"] = round(time.perf_counter() - started, 2)
    report = bmrs.compact_report(compacted)
    before, after = _alternating({"dense": dense, "compacted": compacted}, inputs, rounds)
    found |= {
        "form": report.form,
        "structures": sum(layer.structures for layer in report.layers),
        "pruned": report.pruned,
        "removed": report.removed,
        "error": report.error,
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "flops_before": report.flops_before,
        "flops_after": report.flops_after,
        "ms_before": round(before, 3),
        "ms_after": round(after, 3),
    }
    return found if place == "heads" else found | _by_torch_pruning(dense, model, inputs)


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    columns = (
        *("network", "noise on", "result", "structures", "pruned", "removed", "error", "seconds"),
        *("parameters", "ms", "Torch-Pruning", "its parameters"),
    )
    cells = []
    for entry in rows:
        if entry["form"] == "refused":
            cells.append((entry["network"], entry["noise"], f"refused: {entry['because'][:60]}", *[""] * 9))
            continue
        cells.append(
            (
                entry["network"],
                entry["noise"],
                entry["form"],
                *(str(entry[key]) for key in ("structures", "pruned", "removed")),
                f"{entry['error']:.0e}",
                f"{entry['seconds']:.1f}",
                f"{entry['parameters_before']:,} → {entry['parameters_after']:,}",
                f"{entry['ms_before']:.2f} → {entry['ms_after']:.2f}",
                entry.get("torch_pruning", ""),
                f"{entry['torch_pruning_parameters']:,}" if "torch_pruning_parameters" in entry else "",
            )
        )
    return table(columns, cells)


def _noise(entry: Entry, place: str) -> list[dict[str, Any]]:
    if place == "noise":
        return list(entry.noise)
    return [{"where": where, "structures": "heads", "num_heads": heads} for where, heads in entry.heads]


def _prune(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in noise_layers(model).values():
            draw = torch.rand(layer.num_structures, generator=generator)
            layer.set_kept(draw <= max(_DENSITY, float(draw.min())))


def _inputs(entry: Entry, model: nn.Module) -> Any:
    args, kwargs = entry.inputs(torch.float32)
    if not kwargs:
        return args
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    leaves = tree_flatten(dict(outputs) if isinstance(outputs, Mapping) else outputs)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _alternating(models: Mapping[str, nn.Module], inputs: Any, rounds: int) -> list[float]:
    """Return the median time of a forward pass of each model in milliseconds; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            _run(model, inputs)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started))
    return [statistics.median(measured) for measured in times.values()]


def _by_torch_pruning(dense: nn.Module, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Return whether Torch-Pruning, asked for the same structures, gives a network that runs, and its size."""
    import torch_pruning as tp

    functions = {
        nn.Linear: tp.prune_linear_out_channels,
        nn.modules.conv._ConvNd: tp.prune_conv_out_channels,
        nn.modules.batchnorm._BatchNorm: tp.prune_batchnorm_out_channels,
    }
    pruned = copy.deepcopy(dense)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, layer in noise_layers(model).items():
                # Noise on hidden units lies two levels below its layer.
                host = pruned.get_submodule(name[: name.rindex(".noise")])
                function = next((f for kind, f in functions.items() if isinstance(host, kind)), None)
                graph = tp.DependencyGraph().build_dependency(pruned, inputs)
                if isinstance(host, nn.LSTM):
                    function = graph.get_pruner_of_module(host).prune_out_channels
                if function is None:
                    return {"torch_pruning": f"cannot prune {type(host).__name__}"}
                group = graph.get_pruning_group(host, function, (~layer.mask).nonzero().flatten().tolist())
                group.prune()
            _run(pruned, inputs)
    except Exception as error:
        return {"torch_pruning": f"fails: {type(error).__name__}"}
    return {
        "torch_pruning": "runs",
        "torch_pruning_parameters": sum(parameter.numel() for parameter in pruned.parameters()),
    }


if __name__ == "__main__":
    sys.exit(main())
