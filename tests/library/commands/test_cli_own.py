"""`bmrs train` with images, a network and weights of the user's own."""

import contextlib
import io
import json

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import bmrs
from bmrs.cli import main

pytestmark = pytest.mark.slow  # whole runs

FACTORY = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 8, 3, stride=2)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(self.inner(x).relu().mean((2, 3)))


def net(num_classes, in_channels):
    return Net(num_classes, in_channels)


def wrong():
    return nn.Linear(3, 4)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with class folders of images, a module with a network and a file with weights for other classes."""
    place = tmp_path_factory.mktemp("own")
    (place / "own_network.py").write_text(FACTORY)
    generator = torch.Generator().manual_seed(3)
    for number, name in enumerate(("cats", "dogs", "owls")):
        folder = place / "photos" / name
        folder.mkdir(parents=True)
        for image in range(24):
            pixels = torch.randint(0, 80, (12, 12, 3), generator=generator) + 80 * number
            Image.fromarray(pixels.byte().numpy()).save(folder / f"{image}.png")
    torch.manual_seed(7)
    weights = {
        "conv.weight": torch.randn(6, 3, 3, 3),
        "conv.bias": torch.randn(6),
        "fc.weight": torch.randn(9, 8),
    }
    weights |= {
        "fc.bias": torch.randn(9),
        "inner.weight": torch.randn(8, 6, 3, 3),
        "inner.bias": torch.randn(8),
    }
    weights |= {f"norm.{name}": value for name, value in nn.BatchNorm2d(6).state_dict().items()}
    torch.save(weights, place / "nine_classes.pt")
    return place


@pytest.fixture(autouse=True)
def at_home(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(place)


def run(*arguments):
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(["train", *arguments])
    return code, output.getvalue(), errors.getvalue()


EXTRAS = ("--augmentation", "crop", "--tensorboard", "true")
OPTIONS = [
    *("--data", "folder:photos", "--image-size", "12", "--model", "own_network:net", "--device", "cpu"),
    *("--workers", "0", "--batch-size", "16", "--epochs", "2", "--noise-epochs", "1", "--lr", "0.01"),
    *("--fine-tune-epochs", "1", "--price-exponent", "0", "--criterion", "l2", "--ratio", "0.5"),
]


def test_a_network_and_images_of_ones_own_become_smaller(place, tmp_path, monkeypatch):
    monkeypatch.setattr("bmrs.training.run.draw", lambda *arguments: None)  # saves the time of drawing
    output = tmp_path / "run"
    weights = ("--weights", "nine_classes.pt", "--new-classifier", "true")
    code, text, errors = run(*OPTIONS, *weights, *EXTRAS, "--output", str(output))
    assert (code, errors) == (0, "")
    events = EventAccumulator(str(output / "tensorboard" / "noisy")).Reload()
    assert [event.step for event in events.Scalars("metrics/nll")] == [1]
    assert [event.value for event in events.Scalars("bmrs/kept")][-1] == 7
    assert "reading 72 image files" in text
    summary = json.loads((output / "summary.json").read_text())
    assert summary["kept"] == {"norm.noise": [3, 6], "inner.noise": [4, 8]}
    assert list(summary["networks"]) == ["dense", "compacted", "scratch", "random"]
    sizes = {name: network["parameters"] for name, network in summary["networks"].items()}
    assert sizes["compacted"] == sizes["scratch"] == sizes["random"] < 0.5 * sizes["dense"]
    assert summary["networks"]["dense"]["accuracy"] > 0.5  # brightness alone tells the classes
    # As a stranger loads it, with nothing of the user's own code.
    network = bmrs.load(output / "compacted.safetensors")
    assert network(torch.randn(5, 3, 12, 12)).shape == (5, 3)
    trained = torch.load(place / "nine_classes.pt")
    with contextlib.redirect_stdout(io.StringIO()) as text:
        monkeypatch.chdir(tmp_path)
        assert main(["evaluate", str(output)]) == 0
    assert "own_network:net on folder:" in text.getvalue()
    assert trained["conv.weight"].shape == (6, 3, 3, 3)


def test_a_budget_is_kept_and_without_rivals_there_is_what_it_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr("bmrs.training.run.draw", lambda *arguments: None)
    output = tmp_path / "run"
    places = ("--rivals", "false", "--noise-on", "conv, inner")
    code, text, errors = run(*OPTIONS, *places, "--target-flops", "0.3", "--output", str(output))
    assert (code, errors) == (0, "")
    summary = json.loads((output / "summary.json").read_text())
    dense, compacted = summary["networks"].values()
    assert list(summary["networks"]) == ["dense", "compacted"]
    assert dense["accuracy"] == summary["on_the_way"]["trained"]
    assert compacted["flops"] <= 0.3 * dense["flops"]
    assert set(summary["kept"]) == {"conv.noise", "inner.noise"}
    assert "pruned by L2(ratio=0.5) to FLOPs of at most" in text
    assert summary["budget"].splitlines()[0] in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "--model own_network:wrong",
            "--model own_network:wrong does not take images of shape (3, 12, 12): ",
        ),
        (
            "--model own_network:missing",
            "--model own_network:missing: network 'own_network:missing': module ",
        ),
        ("--model nowhere:net", "--model nowhere:net: network 'nowhere:net': there is no module 'nowhere'"),
        ("--noise-on head*", "--noise-on head*: "),
        ("--weights nine_classes.pt", "weights for other classes need --new-classifier true"),
        ("--weights nowhere.pt", "--weights: no file with weights at "),
        ("--data folder:nowhere", "nowhere: no such folder"),
        ("--target-parameters 2", "--target-parameters: "),
        (
            "--target-latency 1e-6",
            "--target-latency: latency=1e-06 is less than the smallest possible network has: ",
        ),
        ("--normalization paper", "--normalization paper goes with --data fashion-mnist-subset, "),
        ("--noise-on inner", "--noise-on inner goes with networks of bmrs only"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_trained(changes, message):
    code, _, errors = run(*OPTIONS, *changes.split(), "--output", "run")
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_what_can_never_leave_is_said_before_anything_is_trained(tmp_path):
    # A classifier's outputs are the network's own.
    code, _, errors = run(*OPTIONS, "--noise-on", "fc", "--output", str(tmp_path / "run"))
    assert code == 2
    assert "nothing could be removed from this network where --noise-on has noise: " in errors
    assert not (tmp_path / "run").exists()
