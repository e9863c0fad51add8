"""Steps as CUDA graphs: what surrounds the graph, with a stand-in for it, and the graph itself where there is a GPU."""

import dataclasses

import pytest
import torch
from idx_files import write_idx_folder
from torch.utils._python_dispatch import TorchDispatchMode

from bmrs.data import Batch
from bmrs.noise.lookup import noise_layers
from bmrs.training import NonFiniteError, RunError, TrainConfig, algorithm1, cuda_graph, devices, run
from bmrs.training.cuda_graph import WARM_UPS, GraphedStep
from bmrs.training.finite import FiniteWatch
from bmrs.training.training_step import cross_entropy, new_step, update_of

CPU = torch.device("cpu")


class StandIn:
    """Has what counts of a CUDA graph: capturing runs nothing, and a replay writes into the same results."""

    def __init__(self):
        self.warm_ups = self.captures = self.replays = 0

    def warm_up(self, call, stream):
        self.warm_ups += 1
        self.results = call()
        return self.results

    def capture(self, call, stream):
        self.captures += 1
        results = tuple(torch.full_like(result, torch.nan) for result in self.results)

        def replay():
            self.replays += 1
            for result, new in zip(results, call(), strict=True):
                result.copy_(new)

        return results, replay


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(cuda_graph, "warm_up", found.warm_up)
    monkeypatch.setattr(cuda_graph, "capture", found.capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return found


class Silent:
    def step(self, **values):
        pass

    def epoch(self, row):
        pass


def trained(config, device=CPU, *, noise=True):
    data = run.load(config, device)
    state = algorithm1.new_state(config, data, noise=noise, device=device)
    algorithm1.train(state, data, config, save=lambda state: None, progress=Silent())
    return state


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_each_batch_is_stepped_on_once_in_its_turn(stand_in):
    seen = []

    def step(batch, weight):
        assert weight == 1.0
        assert batch.images.tolist() == [[label] for label in batch.labels.tolist()]
        seen.append(batch.labels.tolist())
        return (batch.labels.sum().double(), batch.labels.double())

    graphed = GraphedStep(step, 2)
    batches = [torch.tensor([number, number + 1]) for number in range(WARM_UPS + 2)]
    batches.insert(1, torch.tensor([7]))  # of another size
    results = [
        graphed(Batch(labels[:, None].double(), labels), 1.0) for labels in [*batches, torch.tensor([8])]
    ]
    assert seen == [*(batch.tolist() for batch in batches), [8]]
    # Looked at only now: a later replay must not have changed them.
    assert [total.item() for total, _ in results] == [sum(batch) for batch in seen]
    assert [values.tolist() for _, values in results] == seen
    assert (stand_in.warm_ups, stand_in.captures, stand_in.replays) == (WARM_UPS, 1, 2)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("batch_size", [16, 10])  # 48 images: the second leaves an incomplete batch
@pytest.mark.parametrize("fine_tune_noise", [True, False])
def test_graphed_training_is_bitwise_that_of_single_operations(
    tiny_config, stand_in, noise, batch_size, fine_tune_noise
):
    config = tiny_config(
        epochs=3,
        fine_tune_epochs=2,
        batch_size=batch_size,
        fine_tune_noise=fine_tune_noise,
        criterion="gradient-norm",  # sees the gradients of the last batch
        ratio=0.2,
    )
    expected = trained(config, noise=noise)
    assert stand_in.captures == 0
    found = trained(dataclasses.replace(config, cuda_graph=True), noise=noise)
    # Fine-tuning without noise is another step; a network without noise has one step from start to end.
    steps = 2 if noise and not fine_tune_noise else 1
    per_epoch = 48 // batch_size
    assert stand_in.captures == steps
    assert stand_in.warm_ups == WARM_UPS * steps
    assert stand_in.replays == 5 * per_epoch - WARM_UPS * steps
    assert without_time(found.history) == without_time(expected.history)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
    if noise:
        assert found.history[2]["kept"] != found.history[0]["kept"]  # pruned between replays


def test_training_writes_into_the_tensors_that_a_graph_knows(tiny_config):
    config = tiny_config(criterion="l2", ratio=0.34, epochs=2, fine_tune_epochs=1, fine_tune_noise=True)
    data = run.load(config, CPU)
    state = algorithm1.new_state(config, data, noise=True, device=CPU)
    addresses = []

    def note(state):
        layers = noise_layers(state.model).values()
        of_optimizer = [value for values in state.optimizer.state.values() for value in values.values()]
        tensors = [*state.model.state_dict().values(), *(layer.mask for layer in layers), *of_optimizer]
        addresses.append([tensor.data_ptr() for tensor in tensors])

    algorithm1.train(state, data, config, save=note, progress=Silent())
    assert state.history[-1]["kept"] == {"hidden0_tanh": 3, "hidden1_tanh": 3}
    assert addresses[0] == addresses[1] == addresses[2]


class Operations(TorchDispatchMode):
    """Lists what is run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["mlp", "lenet5"])
@pytest.mark.parametrize("noise", [True, False])
def test_a_step_waits_for_no_value_and_copies_nothing_to_a_device(tiny_config, model, noise):
    only_mlp = {"num_blocks": None, "hidden": None} if model == "lenet5" else {}
    config = tiny_config(model=model, **only_mlp)
    data = run.load(config, CPU)
    state = algorithm1.new_state(config, data, noise=noise, device=CPU)
    state.optimizer.step = lambda: None  # on a CPU it does ask for values
    watch = FiniteWatch(state.model)
    update = update_of(state, config, len(data.train), noise=noise)
    step = new_step(state.model, config, watch, data_loss=cross_entropy(config), update=update)
    with watch, Operations() as operations:
        step(next(data.train.in_order(16)), 1.0)
    assert ("bmrs_kernels::multiply_noise" in operations.names) == noise
    assert "aten::aminmax" in operations.names
    waiting = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "lift_fresh", "masked_select")
    assert not [name for name in operations.names if name.removeprefix("aten::").endswith(waiting)]


def test_a_nan_in_a_replay_is_found(tiny_config, stand_in):
    config = tiny_config(cuda_graph=True)
    data = run.load(config, CPU)
    state = algorithm1.new_state(config, data, noise=True, device=CPU)

    def break_it(state):
        torch.nn.init.constant_(state.model.classes.bias, torch.nan)

    with pytest.raises(
        NonFiniteError, match=r"epoch 2, step 1: first seen in the output of layer 'classes'$"
    ):
        algorithm1.train(state, data, config, save=break_it, progress=Silent())
    assert stand_in.replays


def test_a_graph_needs_a_gpu(tiny_config):
    with pytest.raises(RunError, match="--cuda-graph true needs a GPU, but --device is cpu"):
        devices.device_of(tiny_config(cuda_graph=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", ["mlp", "lenet5"])
def test_a_real_graph_trains_as_single_operations_do(tmp_path, model):
    folder = write_idx_folder(tmp_path / "images", train=200, test=64)
    config = TrainConfig(
        data="mnist",
        data_dir=str(folder),
        model=model,
        epochs=2,
        fine_tune_epochs=1,
        batch_size=24,  # 160 images: the last batch is incomplete
        criterion="l2",
        ratio=0.2,
        device="cuda",
    )
    torch.backends.cudnn.deterministic = True
    try:
        device = devices.device_of(config)
        expected = trained(config, device)
        found = trained(dataclasses.replace(config, cuda_graph=True), device)
    finally:
        torch.backends.cudnn.deterministic = False
    for expected_row, row in zip(expected.history, found.history, strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-4)
        assert row["kept"] == expected_row["kept"]
    for name, tensor in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
