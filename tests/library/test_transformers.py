"""The callback for transformers' Trainer, against the same training written out."""

import copy

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, SequentialSampler

import bmrs
from bmrs.noise.lookup import noise_layers
from bmrs.schedules import PruningSchedule, WarmUp

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

from bmrs.transformers import PruningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = 16
NEVER = PruningSchedule(first=1000)


class Sentences(Dataset):
    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(0, 30, (5,), generator=generator), "labels": index % 2}


class Endless(IterableDataset):
    def __iter__(self):
        return iter(Sentences())


def classifier(log_sigma=-15.0, noise=True):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        vocab_size=30,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    if noise:
        bmrs.add_noise(model, where="*.intermediate.dense", initial_mu=-3.0, initial_log_sigma=log_sigma)
    return model


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return (
            None if isinstance(self.train_dataset, IterableDataset) else SequentialSampler(self.train_dataset)
        )


def fitted(model, callback, folder, *, data=None, optimizer=None, lr=0.05, **options):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    if optimizer is None:
        optimizer = torch.optim.SGD(bmrs.parameter_groups(model, lr=lr))
    trainer = InOrder(
        model=model,
        args=transformers.TrainingArguments(**{**arguments, **options}),
        train_dataset=data or Sentences(),
        callbacks=[callback],
        optimizers=(optimizer, None),
    )
    # This class of theirs takes num_items_in_batch and ignores it, so that its loss would count once for each batch.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return trainer


def written_out(accumulate, warm_up):
    model = classifier().train()
    optimizer = torch.optim.SGD(bmrs.parameter_groups(model, lr=0.05))
    data, steps = Sentences(), EXAMPLES // (2 * accumulate)
    for step in range(2 * steps):
        for part in range(accumulate):
            first = 2 * (step % steps * accumulate + part)
            rows = [data[first], data[first + 1]]
            inputs = torch.stack([row["input_ids"] for row in rows])
            loss = model(input_ids=inputs, labels=torch.tensor([row["labels"] for row in rows])).loss
            (loss / accumulate).backward()
        factor = warm_up(step / steps)
        (factor * bmrs.kl_divergence(model, weight="elbo", dataset_size=EXAMPLES)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(("accumulate", "warm_up"), [(1, WarmUp()), (4, WarmUp()), (1, WarmUp(epochs=1.5))])
def test_kl_counts_once_for_each_step(tmp_path, accumulate, warm_up):
    model = classifier()
    callback = PruningCallback(schedule=NEVER, warm_up=warm_up)
    fitted(model, callback, tmp_path, gradient_accumulation_steps=accumulate)
    expected = dict(written_out(accumulate, warm_up).named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


class Written:
    """What a SummaryWriter was given."""

    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, {})[step] = value

    def add_histogram(self, tag, values, step):
        self.histograms.setdefault(tag, {})[step] = len(values)


def test_prunes_logs_and_compacts(tmp_path):
    model = classifier(log_sigma=-3.0)
    example = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    written = Written()
    callback = PruningCallback(
        criterion=bmrs.SNR(), kl_weight=1.0, example_inputs=example, tensorboard=written
    )
    optimizer = torch.optim.Adam(bmrs.parameter_groups(model, lr=1e-3, noise_lr=0.1))
    trainer = fitted(model, callback, tmp_path, optimizer=optimizer, num_train_epochs=6)
    (layer,) = noise_layers(model).values()
    kept = int(layer.mask.sum())
    assert len(callback.reports) == 6
    assert 1 <= kept < 12
    last = [row for row in trainer.state.log_history if "bmrs/kept" in row][-1]
    assert last["bmrs/kept"] == last["bmrs/kept/bert.encoder.layer.0.intermediate.dense.noise"] == kept
    steps = [8 * epoch for epoch in range(1, 7)]
    assert list(written.scalars["bmrs/kl"]) == steps
    assert written.scalars["bmrs/kept"][steps[-1]] == kept
    assert written.scalars["bmrs/compression"][steps[-1]] == last["bmrs/compression"]
    assert last["bmrs/compression"] == pytest.approx(100 * (1 - kept / 12))
    assert written.histograms["bmrs/delta_f/bert.encoder.layer.0.intermediate.dense.noise"][steps[-1]] == kept
    assert callback.compacted.bert.encoder.layer[0].intermediate.dense.out_features == kept
    torch.testing.assert_close(callback.compacted(**example).logits, model.eval()(**example).logits)
    assert isinstance(copy.deepcopy(callback.compacted), transformers.BertForSequenceClassification)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": lambda: classifier(noise=False)}, "has no noise layer"),
        (
            {"optimizer": lambda model: torch.optim.AdamW(model.parameters(), weight_decay=0.1)},
            r"noise' has weight decay 0\.1: add noise before the Trainer is made.*parameter_groups",
        ),
        (
            {"optimizer": lambda model: torch.optim.SGD(model.classifier.parameters(), lr=0.1)},
            r"noise' is in no optimizer",
        ),
        ({"data": Endless(), "max_steps": 2}, "the training data have no length: give kl_weight a number"),
    ],
)
def test_what_cannot_be_trained_is_said_before_training(tmp_path, options, message):
    options = dict(options)
    model = options.pop("model", classifier)()
    make = options.pop("optimizer", lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=message):
        fitted(model, PruningCallback(), tmp_path, optimizer=make(model), **options)
