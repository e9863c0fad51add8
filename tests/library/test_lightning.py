"""The callback for PyTorch Lightning, against the same training written out."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from several_processes import results_together
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import bmrs
from bmrs.noise.lookup import noise_layers
from bmrs.schedules import PruningSchedule, WarmUp

pl = pytest.importorskip("lightning.pytorch")

from bmrs.lightning import Pruning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = 32


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(EXAMPLES, 6, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (EXAMPLES,), generator=generator),
    )


class Classifier(pl.LightningModule):
    def __init__(self, *, log_sigma=-15.0, noise=True, lr=0.1, optimizer=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).double()
        if noise:
            bmrs.add_noise(self.net, where="0", initial_mu=-3.0, initial_log_sigma=log_sigma)
        self.lr, self.optimizer_type = lr, optimizer
        self.example_input_array = torch.zeros(2, 6, dtype=torch.float64)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer_type(bmrs.parameter_groups(self, lr=self.lr))


def trainer(callback, **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=[callback], **{**defaults, **options})


def written_out(*, accumulate, warm_up=None, epochs=1):
    warm_up = warm_up or WarmUp()
    model = Classifier()
    optimizer = model.configure_optimizers()
    batches = list(DataLoader(data(), batch_size=4))
    for epoch in range(epochs):
        for number, (x, y) in enumerate(batches):
            loss = F.cross_entropy(model(x), y) / accumulate
            loss.backward()
            factor = warm_up(epoch + number / len(batches)) / accumulate
            (factor * bmrs.kl_divergence(model, weight="elbo", dataset_size=EXAMPLES)).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return dict(model.named_parameters())


def same(found, expected):
    found = dict(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value.detach(), rtol=1e-5, atol=1e-6)


NEVER = PruningSchedule(first=1000)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("warm_up", [WarmUp(), WarmUp(epochs=1.5)])
def test_kl_counts_once_for_each_step(accumulate, warm_up):
    model = Classifier()
    callback = Pruning(schedule=NEVER, warm_up=warm_up)
    trainer(callback, accumulate_grad_batches=accumulate, max_epochs=2).fit(
        model, DataLoader(data(), batch_size=4)
    )
    same(model.named_parameters(), written_out(accumulate=accumulate, warm_up=warm_up, epochs=2))


def test_kl_is_scaled_as_a_gradient_scaler_scales_the_loss():
    model = Classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    # Autocast leaves double precision as it is.
    trainer(Pruning(schedule=NEVER), plugins=[precision]).fit(model, DataLoader(data(), batch_size=4))
    assert scaler.state_dict()["_growth_tracker"] == EXAMPLES // 4  # it was at work in every step
    same(model.named_parameters(), written_out(accumulate=1))


class Losses(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows |= metrics


def test_prunes_logs_compacts_and_writes(tmp_path):
    model = Classifier(log_sigma=-3.0, lr=0.1, optimizer=torch.optim.Adam)
    callback = Pruning(
        criterion=bmrs.SNR(),
        kl_weight=1.0,
        schedule=PruningSchedule(every=3),
        output=tmp_path / "small.safetensors",
    )
    logger = Losses()
    run = trainer(callback, max_epochs=12, logger=logger, log_every_n_steps=1)
    run.fit(model, DataLoader(data(), batch_size=4))
    assert len(callback.reports) == 4
    kept = callback.reports[-1].after
    assert 1 <= kept < 10
    assert logger.rows["bmrs/kept"] == logger.rows["bmrs/kept/net.0.noise"] == kept
    assert logger.rows["bmrs/kl"] > 0
    assert callback.compacted.net[0].out_features == kept
    assert logger.rows["bmrs/parameters"] == kept * (6 + 1 + 3) + 3
    x = data().tensors[0]
    loaded = bmrs.load(tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded(x), model.eval()(x))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_examples_come_in_the_trainers_precision(precision):
    class Single(Classifier):
        def __init__(self):
            super().__init__(log_sigma=-3.0)
            self.net.float()
            self.example_input_array = torch.zeros(2, 6)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0].to(self.net[0].weight.dtype)).float(), batch[1])

    callback = Pruning(kl_weight="mean")
    trainer(callback, precision=precision).fit(Single(), DataLoader(data(), batch_size=4))
    assert callback.compacted.net[0].weight.dtype == {"6": torch.float64, "b": torch.bfloat16}[precision[0]]


def test_tensorboard_gets_histograms_beside_the_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = pl.loggers.TensorBoardLogger(tmp_path, name=None, version="run")
    run = trainer(Pruning(schedule=NEVER), max_epochs=2, logger=logger, log_every_n_steps=1)
    run.fit(Classifier(), DataLoader(data(), batch_size=4))
    logger.experiment.close()
    events = accumulator.EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    steps = EXAMPLES // 4
    for tag in ("bmrs/expected_noise/net.0.noise", "bmrs/delta_f/net.0.noise"):
        assert [(e.step, e.histogram_value.num) for e in events.Histograms(tag)] == [
            (steps, 10),
            (2 * steps, 10),
        ]
    assert [event.value for event in events.Scalars("bmrs/kept")] == [10, 10]
    assert [event.value for event in events.Scalars("bmrs/compression")] == [0, 0]
    assert len(events.Scalars("bmrs/kl")) == 2 * steps


def test_a_resumed_run_ends_bitwise_the_same(tmp_path):
    def fitted(epochs, resume=None):
        torch.manual_seed(5)
        model = Classifier(log_sigma=-1.0, optimizer=torch.optim.Adam)
        callback = Pruning(criterion=bmrs.SNR(), kl_weight=1.0, schedule=PruningSchedule(every=2))
        saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename=f"{epochs}", save_last=True)
        run = trainer(callback, max_epochs=epochs, enable_checkpointing=True, default_root_dir=tmp_path)
        run.callbacks.append(saving)
        run.fit(model, DataLoader(data(), batch_size=4, shuffle=True), ckpt_path=resume)
        return model

    straight = fitted(5)
    fitted(2)
    torch.manual_seed(77)  # the state of this process must not matter
    resumed = fitted(5, resume=tmp_path / "2.ckpt")
    assert not all(layer.mask.all() for layer in noise_layers(straight).values())
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


class Endless(IterableDataset):
    def __iter__(self):
        return iter(data())


@pytest.mark.parametrize(
    ("model", "loader", "options", "message"),
    [
        (lambda: Classifier(noise=False), None, {}, "has no noise layer"),
        (
            lambda: LateNoise(),
            None,
            {},
            "the noise of 'net.2.noise' is in no optimizer: call add_noise before",
        ),
        (
            Classifier,
            DataLoader(Endless(), batch_size=4),
            {},
            "the training data have no length: give kl_weight",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_before_training(model, loader, options, message):
    model = model()
    if message == "has no noise layer":
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        trainer(Pruning(**options)).fit(model, DataLoader(data(), batch_size=4) if loader is None else loader)


class LateNoise(Classifier):
    def on_fit_start(self):
        bmrs.add_noise(self.net, where="2")


def test_manual_optimization_is_refused():
    model = Classifier()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="the KL term would count once for each manual_backward"):
        trainer(Pruning()).fit(model, DataLoader(data(), batch_size=4))


def test_deepspeed_is_refused():
    class DeepSpeedLike(pl.strategies.SingleDeviceStrategy):
        pass

    run = trainer(Pruning(), strategy=DeepSpeedLike(device=torch.device("cpu")))
    with pytest.raises(ValueError, match="DeepSpeed takes no gradient beside its own backward pass"):
        run.fit(Classifier(), DataLoader(data(), batch_size=4))


def test_arguments_are_checked_at_once():
    with pytest.raises(TypeError, match=r"write SNR\(\)"):
        Pruning(criterion=bmrs.SNR)


def fit_in_parallel():
    warnings.simplefilter("ignore")
    model = Classifier()
    # Images in turn, so that two batches of two are one of four.
    sampler = DistributedSampler(data(), shuffle=False)
    run = trainer(Pruning(schedule=NEVER), strategy="ddp", devices=2, use_distributed_sampler=False)
    run.fit(model, DataLoader(data(), batch_size=2, sampler=sampler))
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.slow
def test_two_processes_train_what_one_does():
    found = results_together(fit_in_parallel, world=2)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
    same(found[0].items(), written_out(accumulate=1))
