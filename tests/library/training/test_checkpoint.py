"""Checkpoints that are broken, tampered with or of another run: refused in one line, with nothing taken over."""

import dataclasses
import json
import struct

import pytest
import torch
from checkpoint_files import rewrite_checkpoint
from safetensors import safe_open

from bmrs.training import RunError
from bmrs.training.algorithm1 import new_state
from bmrs.training.checkpoint import load_checkpoint, save_checkpoint
from bmrs.training.run import load

CPU = torch.device("cpu")
ROW = {
    "epoch": 1,
    "phase": "train",
    "loss": 2.5,
    "nll": 2.25,
    "kl": 0.25,
    "train_accuracy": 0.5,
    "kept": {"hidden0_tanh": 6, "hidden1_tanh": 6},
    "unsettled": 0.0,
    "compression_percent": 0.0,
    "validation_accuracy": 0.5,
    "seconds": 0.1,
}


def fresh(config):
    return new_state(config, load(config, CPU), noise=True, device=CPU)


@pytest.fixture
def config(tiny_config):
    return tiny_config()


@pytest.fixture
def path(config, tmp_path):
    """A checkpoint after one step."""
    state = fresh(config)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.history.append(ROW)
    save_checkpoint(tmp_path / "checkpoint.safetensors", state, config)
    return tmp_path / "checkpoint.safetensors"


def everything(state):
    """What a checkpoint changes, as it is now."""
    random = (torch.get_rng_state(), state.order.get_state())
    return [
        *(tensor.clone() for tensor in state.model.state_dict().values()),
        *(value.clone() for row in state.optimizer.state.values() for value in row.values()),
        *random,
    ], list(state.history)


def assert_refused(path, config, message):
    state = fresh(config)
    tensors, history = everything(state)
    with pytest.raises(RunError, match=message) as caught:
        load_checkpoint(path, state, config)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    tensors_after, history_after = everything(state)
    assert history_after == history
    assert len(tensors_after) == len(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, tensors_after, strict=True))


@pytest.mark.parametrize("content", [b"", b"nonsense" * 10, b"\xff" * 100])
def test_what_is_no_checkpoint_is_named(config, tmp_path, content):
    (tmp_path / "checkpoint").write_bytes(content)
    assert_refused(tmp_path / "checkpoint", config, "checkpoint is broken")


def test_a_checkpoint_of_another_network_is_refused(path, tiny_config):
    # Without its options, as in older files.
    rewrite_checkpoint(path, lambda scalars, tensors: scalars.pop("options"), checksum=False)
    assert_refused(
        path, tiny_config(hidden=7), r"model.hidden0.\w+ is float32 of shape \(6.*expected float32 of shape"
    )


def replaced(name, value):
    return lambda scalars, tensors: tensors.update({name: value(tensors[name])})


def position(left, following):
    def change(values):
        content = bytearray(values.numpy().tobytes())
        struct.pack_into("=QiiQ", content, 0, 0, left, 1, following)
        return torch.frombuffer(content, dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # With the first two, fused Adam wrote beside its memory.
        (
            replaced("optimizer.0.exp_avg", lambda t: t[:1, 0]),
            r"optimizer.0.exp_avg is float32 of shape \(1,\)",
        ),
        (replaced("optimizer.2.exp_avg_sq", lambda t: t[:1]), r"optimizer.2.exp_avg_sq is float32 of shape"),
        (replaced("optimizer.0.exp_avg", torch.Tensor.double), r"optimizer.0.exp_avg is float64 of shape"),
        (replaced("optimizer.0.step", lambda t: t.view(1)), r"optimizer.0.step is float32 of shape \(1,\)"),
        (
            replaced("optimizer.0.step", lambda t: t - 4.5),
            "optimizer.0.step is -3.5, expected a number of steps",
        ),
        (replaced("optimizer.0.step", lambda t: t * torch.inf), "optimizer.0.step holds NaN or infinity"),
        (lambda s, t: t.pop("optimizer.0.exp_avg"), "it lacks optimizer.0.exp_avg$"),
        (
            lambda s, t: [t.pop(name) for name in list(t) if name.startswith("optimizer.0.")],
            "it lacks optimizer.0.exp_avg and 2 more",
        ),
        (
            lambda s, t: t.update({"optimizer.99.exp_avg": torch.ones(3)}),
            "it holds optimizer.99.exp_avg, which this run has not",
        ),
        (lambda s, t: t.update({"optimizer.x": torch.ones(3)}), "it holds optimizer.x, which"),
        (lambda s, t: t.update({"more": torch.ones(3)}), "it holds more, which"),
        (lambda s, t: t.pop("model.hidden0.bias"), "it lacks model.hidden0.bias"),
        (
            replaced("model.hidden0.bias", lambda t: t[:5]),
            r"model.hidden0.bias is .*\(5,\), expected .*\(6,\)",
        ),
        (replaced("model.hidden0.bias", torch.Tensor.half), "model.hidden0.bias is float16 of shape"),
        (replaced("model.hidden0.bias", lambda t: t * torch.nan), "model.hidden0.bias holds NaN or infinity"),
        (
            replaced("model.hidden0_tanh.mask", lambda t: t & False),
            "noise layer 'hidden0_tanh' leaves no structure",
        ),
        (replaced("model.hidden0_tanh.mask", torch.Tensor.float), "hidden0_tanh.mask is float32"),
        (replaced("random.cpu", torch.Tensor.float), "random.cpu is float32 of shape"),
        (replaced("random.order", lambda t: t[:-1]), r"random.order is uint8 of shape \(5055,\), expected"),
        (replaced("random.cpu", lambda t: t * 0 + 255), "random.cpu is no state of a generator"),
        # torch takes this one, and reads beyond its numbers.
        (
            replaced("random.cpu", position(624, 624)),
            "random.cpu is no state of a generator: it points beyond",
        ),
        (lambda s, t: t.pop("random.order"), "it lacks random.order"),
        (
            replaced("random.order", lambda t: torch.Generator().manual_seed(1).get_state()),
            "random.order is of --seed 1, and this run has --seed 0",
        ),
        (
            lambda s, t: s["options"].update(seed=1),
            "of a run with --seed 1, and this run's config.json says 0",
        ),
        (lambda s, t: s["options"].update(lr=0.5), "of a run with --lr 0.5, and this run's config.json says"),
        (lambda s, t: s.update(options=[]), "its options are not a mapping"),
        (lambda s, t: s.update(more=1), "its metadata have the keys"),
        (lambda s, t: s.pop("history"), "its metadata have the keys"),
        (lambda s, t: s.update(history={}), "its history is a dict, expected a list of epochs"),
        (lambda s, t: s.update(history="x" * 10**6), "its history is a str"),
        (lambda s, t: s.update(history=[]), "it holds optimizer.0.exp_avg and 29 more, which"),
        (lambda s, t: s["history"].append("x"), "epoch 2 of its history is a str, expected a mapping"),
        (lambda s, t: s["history"][0].update(epoch=3), "epoch 1 of its history says that it is epoch 3"),
        (lambda s, t: s["history"][0].update(epoch="1"), "epoch 1 of its history has 'epoch' '1'"),
        (lambda s, t: s["history"][0].update(loss=None), "epoch 1 of its history has 'loss' None"),
        (lambda s, t: s["history"][0].update(kl=10**400), "epoch 1 of its history has 'kl' 1000"),
        (lambda s, t: s["history"][0].update(seconds=True), "epoch 1 of its history has 'seconds' True"),
        (lambda s, t: s["history"][0].update(kept={}), "epoch 1 of its history has 'kept'"),
        (lambda s, t: s["history"][0]["kept"].update(hidden0_tanh=7), "epoch 1 of its history has 'kept'"),
        (lambda s, t: s["history"][0].update(pruning=3), "epoch 1 of its history has 'pruning' 3"),
        (
            lambda s, t: s["history"][0].update(pruning={"layers": [{}]}),
            "epoch 1 of its history has 'pruning'",
        ),
        (lambda s, t: s["history"][0].pop("kept"), "epoch 1 of its history lacks 'kept'"),
    ],
)
def test_what_does_not_fit_is_named(path, config, change, message):
    rewrite_checkpoint(path, change)
    assert_refused(path, config, message)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bytes_are_noticed(path, config, seed):
    content = bytearray(path.read_bytes())
    for place in torch.randperm(len(content), generator=torch.Generator().manual_seed(seed))[:30].tolist():
        content[place] ^= 0x10
    path.write_bytes(content)
    assert_refused(path, config, "is broken")


def test_a_flipped_byte_of_a_weight_is_noticed(path, config):
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert_refused(path, config, "the file is damaged, as its checksum is not that of what it holds")


def test_files_from_before_checksums_are_read(path, config):
    with safe_open(path, framework="pt") as file:
        assert set(json.loads(file.metadata()["bmrs_training"])) == {"history", "options", "checksum"}

    def as_before(scalars, tensors):
        del scalars["options"], scalars["history"][0]["unsettled"]

    rewrite_checkpoint(path, as_before, checksum=False)
    state = fresh(config)
    load_checkpoint(path, state, config)
    assert [row["epoch"] for row in state.history] == [1]
    assert all(values["step"] == 1 for values in state.optimizer.state.values())


def test_where_data_lie_and_what_computes_may_change(path, config, tmp_path):
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = dataclasses.replace(config, data_dir=str(tmp_path / "moved"), device="auto")
    state = fresh(moved)
    load_checkpoint(path, state, moved)
    assert len(state.history) == 1
