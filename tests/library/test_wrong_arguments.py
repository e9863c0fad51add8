"""Arguments of the wrong kind: one line that says what was expected, and nothing changed."""

import copy

import pytest
import torch
from torch import nn

import bmrs

X = torch.ones(4, 3)


@pytest.fixture
def noisy():
    return bmrs.add_noise(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), where="0")


def loss(model, batch):
    return model(batch).mean()


CALLS = {
    "a criterion's class": (lambda m: bmrs.prune(m, bmrs.BMRSNormal), r"got its class: write BMRSNormal\(\)"),
    "a criterion's name": (lambda m: bmrs.prune(m, "bmrs"), r"such as bmrs.BMRSOdds\(\), got 'bmrs'"),
    "no criterion": (lambda m: bmrs.prune(m, None), "criterion must be one of those of bmrs.*got None"),
    "no examples": (lambda m: bmrs.compact(m, None), "example_inputs must be a tensor.*got NoneType"),
    "a number as examples": (
        lambda m: bmrs.prune(m, bmrs.SNR(), example_inputs=3),
        "example_inputs must be a tensor.*got int",
    ),
    "no model to compact": (lambda m: bmrs.compact("m", X), "model must be a torch.nn.Module, got 'm'"),
    "no model to prune": (lambda m: bmrs.prune("m", bmrs.SNR()), "model must be a torch.nn.Module, got 'm'"),
    "no model for KL": (
        lambda m: bmrs.kl_divergence(None, weight="mean"),
        "model must be a torch.nn.Module, got None",
    ),
    "no model to fold": (lambda m: bmrs.fold(3), "model must be a torch.nn.Module, got 3"),
    "no model for noise": (
        lambda m: bmrs.add_noise("m", where="0"),
        "model must be a torch.nn.Module, got 'm'",
    ),
    "no batches": (
        lambda m: bmrs.learn_posteriors(m, 3, loss, dataset_size=4),
        "batches must be an iterable of batches, such as a DataLoader, got 3",
    ),
    "no loss": (
        lambda m: bmrs.learn_posteriors(m, [X], 5, dataset_size=4),
        r"loss must be a function of \(model, batch\), got 5",
    ),
    "no path to save": (lambda m: bmrs.save(None, m), "path must be a str or os.PathLike, got None"),
    "no path to load": (lambda m: bmrs.load(3), "path must be a str or os.PathLike, got 3"),
    "path and examples the wrong way round": (
        lambda m: bmrs.export(m, "small.onnx", X),
        "path must be a str or os.PathLike, got tensor",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_arguments_are_named(call, noisy):
    function, message = CALLS[call]
    before = copy.deepcopy(noisy.state_dict())
    with pytest.raises(TypeError, match=message):
        function(noisy)
    assert all(torch.equal(before[name], value) for name, value in noisy.state_dict().items())
