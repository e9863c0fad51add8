import dataclasses

import pytest
import torch

from bmrs.data import load_dataset, preprocess
from bmrs.noise.lookup import noise_layers
from bmrs.training.algorithm1 import new_state, train
from bmrs.training.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


class Recorder:
    def __init__(self):
        self.steps, self.rows = [], []

    def step(self, **values):
        self.steps.append(values)

    def epoch(self, row):
        self.rows.append(row)


def load(config):
    data = load_dataset(config.data, config.data_dir, seed=config.seed)
    return dataclasses.replace(
        data,
        **{
            name: dataclasses.replace(split, images=preprocess(split.images, name=config.data))
            for name in ("train", "validation", "test")
            for split in [getattr(data, name)]
        },
    )


def run(config, *, noise=True):
    data = load(config)
    state = new_state(config, data, noise=noise, device=CPU)
    recorder = Recorder()
    train(state, data, config, save=lambda state: None, progress=recorder)
    return state, recorder


def test_dense_network_starts_from_the_same_weights_and_order(tiny_config):
    config = tiny_config()
    noisy, dense = (new_state(config, load(config), noise=noise, device=CPU) for noise in (True, False))
    weights = dict(noisy.model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in dense.model.named_parameters())
    assert not noise_layers(dense.model)
    assert torch.equal(noisy.order.get_state(), dense.order.get_state())


def test_lenet5_is_built_for_the_images_channels(tiny_config):
    config = tiny_config(model="lenet5", num_blocks=None, hidden=None, granularity="sample")
    model = new_state(config, load(config), noise=True, device=CPU).model
    assert model.conv1.weight.shape == (6, 1, 5, 5)
    assert {layer.granularity for layer in noise_layers(model).values()} == {"sample"}


def test_rows_hold_the_epochs_metrics(tiny_config):
    state, recorder = run(tiny_config(epochs=2, fine_tune_epochs=1))
    rows = state.history
    assert recorder.rows == rows
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["phase"] for row in rows] == ["train", "train", "fine-tune"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["nll"] + row["kl"])
        assert 0 <= row["train_accuracy"] <= 1
        assert 0 <= row["validation_accuracy"] <= 1
        assert row["kept"] == {"hidden0_tanh": 6, "hidden1_tanh": 6}
        assert row["compression_percent"] == 0
        assert row["seconds"] > 0
    assert recorder.steps[-1] == {
        "epoch": 3,
        "step": 3,
        "steps": 3,
        "loss": rows[-1]["loss"],
        "kl": rows[-1]["kl"],
    }


def test_dense_training_has_no_noise_in_its_loss_and_learns(tiny_config):
    state, _ = run(tiny_config(epochs=20, hidden=32, lr=0.01), noise=False)
    assert {row["kl"] for row in state.history} == {0.0}
    assert "kept" not in state.history[0]
    assert state.history[-1]["nll"] < 0.1 < state.history[0]["nll"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prune_every": 1}, [4, 3, 2, 2, 2, 2]),
        ({"prune_every": 2}, [6, 4, 4, 3, 3, 3]),
        # The last epoch of training prunes in any case.
        ({"prune_every": 3}, [6, 6, 4, 3, 3, 3]),
        ({"mode": "post-training"}, [6, 6, 6, 4, 4, 4]),
    ],
)
def test_pruning_follows_the_schedule_and_stops_for_fine_tuning(tiny_config, options, expected):
    config = tiny_config(criterion="l2", ratio=0.34, epochs=4, fine_tune_epochs=2, **options)
    state, _ = run(config)
    assert [row["kept"]["hidden0_tanh"] for row in state.history] == expected
    assert [row["kept"]["hidden1_tanh"] for row in state.history] == expected
    pruned = [row["epoch"] for row in state.history if "pruning" in row]
    assert 4 in pruned
    assert max(pruned) == 4
    compressions = [row["compression_percent"] for row in state.history]
    assert compressions == sorted(compressions)
    assert compressions[-1] > 30


def test_gradient_norm_has_the_last_batchs_gradients(tiny_config):
    state, _ = run(tiny_config(criterion="gradient-norm", ratio=0.5, epochs=1, fine_tune_epochs=0))
    assert state.history[-1]["kept"] == {"hidden0_tanh": 3, "hidden1_tanh": 3}


def test_kl_weight_reaches_the_loss(tiny_config):
    small, large = (
        run(tiny_config(kl_weight=weight, epochs=1))[0].history[0]["kl"] for weight in (1e-3, 1e-2)
    )
    assert large == pytest.approx(10 * small, rel=0.05)
    # 48 training images, 12 structures in 2 layers.
    elbo, mean = (
        run(tiny_config(kl_weight=weight, epochs=1))[0].history[0]["kl"] for weight in ("elbo", "mean")
    )
    assert mean / elbo == pytest.approx(48 / 12, rel=0.05)


# Checkpoints


def test_checkpoint_brings_back_everything(tiny_config, tmp_path):
    config = tiny_config()
    state, _ = run(config)
    save_checkpoint(tmp_path / "checkpoint", state, config)
    expected_random = torch.rand(3)

    other = new_state(config, load(config), noise=True, device=CPU)
    load_checkpoint(tmp_path / "checkpoint", other, config)
    assert torch.equal(torch.rand(3), expected_random)
    assert torch.equal(other.order.get_state(), state.order.get_state())
    assert other.history == state.history
    expected, found = state.model.state_dict(), other.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    expected, found = state.optimizer.state_dict(), other.optimizer.state_dict()
    assert expected["param_groups"] == found["param_groups"]
    for index, values in expected["state"].items():
        assert all(torch.equal(found["state"][index][name], tensor) for name, tensor in values.items())


def test_weights_and_noise_have_their_own_learning_rates(tiny_config):
    config = tiny_config(lr=1e-3, noise_lr=1e-2, epochs=1, fine_tune_epochs=0)
    before = new_state(config, load(config), noise=True, device=CPU).model.state_dict()
    after = run(config)[0].model.state_dict()
    moved = {
        name: (after[name] - before[name]).abs().max().item()
        for name in before
        if before[name].dtype != torch.bool
    }
    # Adam moves a parameter by up to its learning rate at each of the three steps.
    assert moved["hidden0_tanh.log_sigma"] == pytest.approx(3e-2, rel=0.1)
    assert 1e-3 < moved["hidden0.weight"] < 3.1e-3


def test_fine_tuning_trains_the_weights_alone_in_the_network_without_noise(tiny_config):
    config = tiny_config(epochs=1, fine_tune_epochs=2)
    trained = run(tiny_config(epochs=1, fine_tune_epochs=0))[0].model.state_dict()
    state, _ = run(config)
    assert [row["kl"] > 0 for row in state.history] == [True, False, False]
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, trained[name]) == ("_tanh" in name), name
    assert all(parameter.requires_grad for parameter in state.model.parameters())
    # Nothing is drawn: the same images in the same order give the same weights whatever the random state.
    data = load(config)
    again = new_state(config, data, noise=True, device=CPU)
    train(again, data, config, save=lambda state: torch.rand(1), progress=Recorder())
    assert torch.equal(again.model.classes.weight, state.model.classes.weight)


def test_fine_tuning_with_noise_goes_on_as_before(tiny_config):
    straight = run(tiny_config(epochs=3, fine_tune_epochs=0, mode="post-training"))[0]
    tuned = run(tiny_config(epochs=1, fine_tune_epochs=2, fine_tune_noise=True, mode="post-training"))[0]
    assert all(row["kl"] > 0 for row in tuned.history)
    assert all(
        torch.equal(tensor, straight.model.state_dict()[name])
        for name, tensor in tuned.model.state_dict().items()
    )
