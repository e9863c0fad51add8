"""Networks for other runtimes; `tests/library/runs` has them for runs, with ONNX."""

from importlib import metadata

import pytest
import torch
from torch import nn

import bmrs

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(x)


class Odd(nn.Module):
    """Several inputs by name, and an operator that ONNX has not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), Inner()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.linear(x) + self.inner(y), "y": y}


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.view(3, 4))


class Branching(OneNumber):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Written(OneNumber):
    """Has the number of examples that it was traced with in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + float(len(x))


@pytest.mark.parametrize("name", ["pt2", "torchscript"])
def test_several_inputs_by_name(name, tmp_path):
    model = Odd().train()
    random_state = torch.get_rng_state()
    inputs = {"x": X, "y": X + 1}
    report = bmrs.export(model, inputs, tmp_path / "odd", format=name)
    assert isinstance(report, bmrs.ExportReport)
    assert (report.difference, report.dynamic_batch, report.fixed_because) == (0.0, True, "")
    assert report.file_size == (tmp_path / "odd").stat().st_size
    assert metadata.version("torch") in str(report)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_network_for_one_number_of_examples_is_told(tmp_path):
    report = bmrs.export(OneNumber(), X, tmp_path / "model", format="pt2")
    assert not report.dynamic_batch
    assert "the number of the examples alone: the network itself takes no other one" in str(report)


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "options", "error", "message"),
        [
            (
                Branching(),
                {"format": "pt2"},
                ValueError,
                r"failed on Branching at line \d+ of .*branches on val",
            ),
            (Branching(), {"format": "torchscript"}, ValueError, r"failed on Branching at line \d+"),
            (
                Written(),
                {"format": "torchscript"},
                RuntimeError,
                "wrong outputs for 1 examples, .* nothing was",
            ),
            (nn.Linear(5, 2), {"format": "pt2"}, ValueError, r"\(Linear\) does not run on example_inputs"),
            (
                nn.Linear(4, 2),
                {"format": "tflite"},
                ValueError,
                "format must be one of 'onnx', 'pt2', 'torchs",
            ),
            (bmrs.NoiseLayer(4), {}, TypeError, r"without noise layers, and '' is one: bmrs\.compact"),
            (bmrs.models.LeNet5(), {}, TypeError, r"'conv1_relu' is one: .*bmrs\.fold"),
            ("model", {}, TypeError, r"model must be a torch\.nn\.Module"),
        ],
    )
    def test_what_cannot_be_exported(self, model, options, error, message, tmp_path):
        with pytest.raises(error, match=message):
            bmrs.export(model, X, tmp_path / "model", **options)
        assert not list(tmp_path.iterdir())

    def test_the_layer_of_an_operator_that_onnx_has_not_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"cannot export Odd \(.*i0e\.default in layer 'inner'\)"):
            bmrs.export(Odd(), (X, X), tmp_path / "odd.onnx")
        assert not list(tmp_path.iterdir())

    def test_files_that_exist(self, tmp_path):
        file = tmp_path / "model"
        file.write_text("mine")
        with pytest.raises(FileExistsError, match=r"exists: give another file, or overwrite=True"):
            bmrs.export(nn.Linear(4, 2), X, file, format="pt2")
        with pytest.raises(FileExistsError, match="is a folder"):
            bmrs.export(nn.Linear(4, 2), X, tmp_path, format="pt2")
        with pytest.raises(FileNotFoundError, match=r"missing: no such folder, for the file model"):
            bmrs.export(nn.Linear(4, 2), X, tmp_path / "missing" / "model", format="pt2")
        assert file.read_text() == "mine"
