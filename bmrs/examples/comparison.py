"""What the examples share: training, the ways to a smaller network that they compare, and what is measured."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bmrs
from bmrs.compaction.flop_count import forward_flops
from bmrs.graph.inputs import as_inputs
from bmrs.text_table import table_lines

Batch = Sequence[Tensor]
"""Inputs of some examples, and their labels last."""
Logits = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Row:
    """A network of the comparison.

    Attributes:
        network: how it came about.
        parameters: their number.
        flops: floating-point operations for one example, two for each multiply-add.
        pruned: test accuracy before fine-tuning, in [0, 1].
        refitted: the same of the network refitted by least squares, if that was done.
        fine_tuned: test accuracy after it, in [0, 1].
        time: of a batch, over that of the dense network.
    """

    network: str
    parameters: int
    flops: int
    pruned: float
    refitted: float | None
    fine_tuned: float
    time: float


def needed(module: str) -> Any:
    """Import a package of the extra ``examples``, or end the program with a hint."""
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        raise SystemExit(
            f"this example needs the package {module}, which is not installed: pip install '.[examples]'"
        ) from None


def parser(description: str | None, *, temperature: float, output: Path) -> argparse.ArgumentParser:
    """Return the options that the examples have in common."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument(
        "--temperature", type=float, default=temperature, help=f"the larger, the more goes; {temperature:g}"
    )
    found.add_argument("--seed", type=int, default=0, help="of weights, order, noise and random choices; 0")
    found.add_argument("--quick", action="store_true", help="few examples and steps, to see that it runs")
    found.add_argument("--output", type=Path, default=output, help=f"folder of what it writes; {output}")
    return found


def loader(tensors: Batch, *, batch_size: int, seed: int | None = None) -> DataLoader[Any]:
    """Return batches of these examples, shuffled if there is a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*tensors), batch_size, shuffle=seed is not None, generator=generator)


def train(model: nn.Module, batches: DataLoader[Any], logits: Logits, *, steps: int, lr: float) -> nn.Module:
    """Train all weights with AdamW and a learning rate that falls to 0, and return the network for evaluation.

    Batch norms keep the statistics that they have: those of single batches are worse.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    step = 0
    while step < steps:
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(logits(model, batch), batch[-1]).backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == steps:
                break
    return model.eval()


@torch.no_grad()
def with_new_statistics(model: nn.Module, batches: DataLoader[Any], logits: Logits) -> nn.Module:
    """Return a copy of a network whose batch norms have the statistics of these examples."""
    network = copy.deepcopy(model).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
            layer.train()
    for batch in batches:
        logits(network, batch)
    return network.eval()


def train_once(
    path: Path, model: nn.Module, batches: DataLoader[Any], logits: Logits, *, steps: int, lr: float
) -> None:
    """Train a network and write its weights to a file, or read them where an earlier run has left it."""
    if path.exists():
        safetensors.torch.load_model(model, path)
        model.eval()
        print(f"the dense network is that of {path}")
    else:
        train(model, batches, logits, steps=steps, lr=lr)
        safetensors.torch.save_model(model, str(path))


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader[Any], logits: Logits) -> float:
    """Return the share of the examples that a network in evaluation mode classifies right."""
    model.eval()
    right = sum(int((logits(model, batch).argmax(1) == batch[-1]).sum()) for batch in batches)
    return right / len(batches.dataset)  # type: ignore[arg-type]


def random_structures(
    pruned: nn.Module, examples: Any, *, seed: int, refit_to: nn.Module | None = None
) -> nn.Module:
    """Compact a network to the widths that its pruning found, with structures that are drawn."""
    network = copy.deepcopy(pruned)
    torch.manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, bmrs.NoiseLayer):
            layer.set_kept(layer.kept[torch.randperm(layer.num_structures)])
    return bmrs.compact(network, examples, expected_noise=False, refit_to=refit_to)


def torch_pruned(
    model: nn.Module, example: Any, importance: str, *, flops: int, seed: int, **options: Any
) -> nn.Module:
    """Return what Torch-Pruning makes of a network, with the ratio that comes closest to so many FLOPs.

    Args:
        model: left as it is.
        example: inputs of one example, a tensor or a dict.
        importance: "L2" or "random".
        flops: the FLOPs to reach.
        seed: of random importances.
        options: of `torch_pruning.pruner.BasePruner`, as functions of the copied model that is pruned.
    """
    tp = needed("torch_pruning")
    importances = {
        "L2": tp.importance.GroupMagnitudeImportance(p=2),
        "random": tp.importance.RandomImportance(),
    }
    found, lowest, highest = [], 0.0, 1.0
    for _ in range(8):
        ratio = (lowest + highest) / 2
        network = copy.deepcopy(model).eval()
        torch.manual_seed(seed)
        tp.pruner.BasePruner(
            network,
            example,
            importance=importances[importance],
            global_pruning=True,
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            **{name: option(network) for name, option in options.items()},
        ).step()
        reached = count_flops(network, example)
        found.append((abs(reached - flops), network))
        lowest, highest = (ratio, highest) if reached > flops else (lowest, ratio)
    return min(found, key=lambda pair: pair[0])[1]


@torch.no_grad()
def count_flops(model: nn.Module, example: Any) -> int:
    """Return the floating-point operations of a forward pass."""
    return forward_flops(model, as_inputs(example))


@torch.no_grad()
def relative_times(networks: Mapping[str, nn.Module], batch: Any, *, rounds: int) -> dict[str, float]:
    """Return median times of a batch over those of the first network, which were taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            _call(network, batch)
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    first = statistics.median(next(iter(times.values())))
    return {name: statistics.median(values) / first for name, values in times.items()}


def compare(
    networks: Mapping[str, nn.Module],
    refitted: Mapping[str, nn.Module],
    fine_tune: Callable[[nn.Module], nn.Module],
    test: DataLoader[Any],
    logits: Logits,
    examples: Any,
    *,
    rounds: int,
    tune_refitted: bool,
) -> tuple[list[Row], dict[str, nn.Module]]:
    """Fine-tune all networks alike, the dense one first, measure them, and return them too.

    Args:
        networks: by how they came about.
        refitted: those of them that can be refitted, with refitted weights.
        fine_tune: trains a network.
        test: the examples that accuracies are of.
        logits: what a network says to a batch.
        examples: inputs of a batch, for times.
        rounds: of which times are medians.
        tune_refitted: whether fine-tuning starts from refitted weights where there are some.
    """
    example = _first(examples)
    pruned = {name: accuracy(network, test, logits) for name, network in networks.items()}
    without_training = {name: accuracy(network, test, logits) for name, network in refitted.items()}
    starts = {**networks, **refitted} if tune_refitted else networks
    tuned = {name: fine_tune(network) for name, network in starts.items()}
    times = relative_times(tuned, examples, rounds=rounds)
    rows = [
        Row(
            network=name,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            flops=count_flops(network, example),
            pruned=pruned[name],
            refitted=without_training.get(name),
            fine_tuned=accuracy(network, test, logits),
            time=times[name],
        )
        for name, network in tuned.items()
    ]
    print(table(rows))
    return rows, tuned


def table(rows: Sequence[Row]) -> str:
    """Return the comparison as text."""
    header = ("parameters", "MFLOPs", "pruned, %", "refitted, %", "fine-tuned, %", "time", "network")
    cells = [
        (
            f"{row.parameters:,}",
            f"{row.flops / 1e6:,.1f}",
            f"{row.pruned:.1%}"[:-1],
            "" if row.refitted is None else f"{row.refitted:.1%}"[:-1],
            f"{row.fine_tuned:.1%}"[:-1],
            f"{row.time:.2f}",
            row.network,
        )
        for row in rows
    ]
    return "\n".join(table_lines([header, *cells], left=len(header) - 1))


def export_onnx(model: nn.Module, examples: Any, path: Path) -> float:
    """Write an ONNX file, run it, and return how far its logits are from the network's, over their largest."""
    onnxruntime = needed("onnxruntime")
    needed("onnxscript")
    inputs = examples if isinstance(examples, dict) else {"images": examples}
    given: dict[str, Any] = {"kwargs": examples} if isinstance(examples, dict) else {"args": (examples,)}
    torch.onnx.export(model, f=path, input_names=list(inputs), dynamo=True, verbose=False, **given)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        expected = _call(model, examples)
    return float((torch.from_numpy(output) - expected).abs().max() / expected.abs().max())


def write_results(
    options: argparse.Namespace, parts: Sequence[Batch], rows: Sequence[Row], **more: Any
) -> None:
    """Write the comparison, and what it was made with, as ``results.json`` in the output folder."""
    facts = {
        "temperature": options.temperature,
        "seed": options.seed,
        **{name: len(part[-1]) for name, part in zip(("training", "validation", "test"), parts, strict=True)},
        "threads": torch.get_num_threads(),
        "cpu_seconds": round(time.process_time()),
        **{package: metadata.version(package) for package in ("torch", "torch-pruning")},
        **more,
        "rows": [asdict(row) for row in rows],
    }
    (options.output / "results.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{facts['cpu_seconds']} s of CPU time; the network and these numbers are in {options.output}")


def _call(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def _first(examples: Any) -> Any:
    """Return the first example alone."""
    if isinstance(examples, dict):
        return {name: tensor[:1] for name, tensor in examples.items()}
    return examples[:1]
