"""How much memory compaction takes beside the model: ``python -m benchmarks compaction-memory``.

Llamas of rising size with random float32 weights, a tenth of the hidden units of their feed-forward layers pruned, one
sequence of eight tokens; a fresh process on one thread for each. What is counted is the resident memory of the process
at its peak, less that before `bmrs.compact` was called, when it held the model and had run it once.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import bmrs
from benchmarks.environment import environment
from benchmarks.markdown import table
from benchmarks.processes import workers
from benchmarks.records import RESULTS
from bmrs.noise.lookup import noise_layers

# Width, hidden units of a feed-forward layer, layers, heads, words.
SIZES = {
    "44 million": (512, 1408, 12, 8, 8_000),
    "207 million": (1024, 2816, 12, 16, 32_000),
    "1.2 billion": (2048, 5632, 22, 32, 32_000),
}
DENSITY = 0.9


def main(arguments: Sequence[str] | None = None) -> int:
    """Compact models, print the table and keep it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compaction-memory", description=__doc__)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help="parameters of models (default: all)")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "compaction",
        help="folder for rows (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if unknown := [size for size in options.sizes if size not in SIZES]:
        parser.error(f"sizes must be of {', '.join(SIZES)}, got {', '.join(unknown)}")
    about = environment()
    rows = []
    for size in options.sizes:
        with workers(1) as pool:
            rows.append(
                {"parameters": size, **pool.submit(measured, *SIZES[size]).result(), "environment": about}
            )
    options.output.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (options.output / "memory.jsonl").write_text(text, encoding="utf-8")
    print(as_table(rows))
    return 0


def measured(width: int, hidden: int, layers: int, heads: int, words: int) -> dict[str, Any]:
    """Compact a Llama, and return bytes of it, of the result, and at the peak beside it."""
    import transformers

    torch.manual_seed(0)
    library: Any = transformers
    config = library.LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=words,
    )
    model = library.LlamaForCausalLM(config).eval()
    own = sum(parameter.nbytes for parameter in model.parameters())
    bmrs.add_noise(model, where=lambda name, _: name.endswith("up_proj"))
    for layer in noise_layers(model).values():
        layer.set_kept(torch.rand(layer.num_structures) < DENSITY)
    inputs = {"input_ids": torch.arange(8)[None], "use_cache": False}
    with torch.no_grad():
        model(**inputs)
    before = _resident()
    compacted = bmrs.compact(model, inputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = sum(parameter.nbytes for parameter in compacted.parameters())
    return {"own": own, "result": result, "peak": peak - before}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    cells = [
        (
            row["parameters"],
            f"{row['own'] / 2**20:,.0f}",
            f"{row['result'] / row['own']:.2f}",
            f"{row['peak'] / row['own']:.2f}",
        )
        for row in rows
    ]
    columns = (
        "parameters",
        "its memory, MiB",
        "the result, of it",
        "at the peak, the result included, of it",
    )
    return table(columns, cells)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
