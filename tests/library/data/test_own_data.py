import numpy as np
import own_data_sets
import pytest
import torch
from own_data_sets import KINDS, WRONG_KINDS, Numbered

from bmrs.data import DataError, StreamedSplit, load_dataset
from bmrs.data.workers import num_workers

CPU = torch.device("cpu")


def load(name, **options):
    return load_dataset(f"own_data_sets:{name}", **{"workers": 0, **options})


def numbers_of(split, indices=None):
    keys = [torch.tensor(part) for part in indices] if indices else torch.arange(len(split)).split(5)
    batches = list(split.batches(keys))
    assert [len(batch.images) for batch in batches] == [len(key) for key in keys]
    return torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).long().tolist()


def test_a_factory_of_a_dict_is_read_and_validation_cut_off():
    data = load("good")
    assert isinstance(data.train, StreamedSplit)
    assert data.num_classes == 3
    assert data.image_size is None
    assert data.train.image_shape == (3, 4, 5)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [10, 2, 6]
    assert sorted(numbers_of(data.train) + numbers_of(data.validation)) == list(range(12))
    assert numbers_of(data.test) == list(range(6))
    (batch,) = data.test.in_order(6)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.labels.dtype == torch.int64
    others = load("good", seed=1).validation
    assert numbers_of(load("good").validation) == numbers_of(data.validation) != numbers_of(others)


def test_a_factory_of_an_object_brings_its_own_validation():
    data = load("as_object")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [12, 4, 6]
    assert data.num_classes == 7
    assert data.notes == ()


def test_classes_are_counted_if_nobody_says_how_many():
    data = load("uncounted")
    assert data.num_classes == 3
    assert "3 classes, found by reading 12 examples; num_classes beside train saves that" in data.notes[0]
    assert load("named_classes").num_classes == 4
    assert load("named_classes").notes == ()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_of_the_indices(workers):
    split = load("good", workers=workers).test
    assert numbers_of(split, [[5, 0], [3], [1, 1, 4], [2]]) == [5, 0, 3, 1, 1, 4, 2]
    assert split.examples(2)[:, 0, 0, 0].tolist() == [0, 1]
    assert split.examples(50).shape == (6, 3, 4, 5)
    # Left early, it leaves nothing behind that would fail.
    next(split.in_order(2))


@pytest.mark.parametrize("kind", KINDS)
def test_images_may_be_of_any_of_these_kinds(monkeypatch, kind):
    monkeypatch.setattr(
        own_data_sets,
        "good",
        lambda: {"train": Numbered(12, KINDS[kind]), "test": Numbered(3, KINDS[kind]), "num_classes": 3},
    )
    (batch,) = load("good").test.in_order(3)
    assert batch.images.shape == (3, 3, 4, 5)
    assert batch.images.dtype == (torch.float32 if "floats" in kind else torch.uint8)
    scale = 255 if kind == "floats" else 1
    torch.testing.assert_close(batch.images[2].double() * scale, torch.full((3, 4, 5), 2.0).double())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "an image of type str, expected a tensor or an array of shape"),
        ("integers", r"an image of shape \(3, 4, 5\) and int64, expected"),
        ("an array of integers", "an image of int64, expected"),
        ("no channels", r"an image of shape \(4, 5\) and uint8, expected"),
        ("channels last", r"an image of shape \(16, 5, 3\) and uint8, whose channels seem to be last"),
        ("nothing", r"an image of shape \(0, 4, 5\)"),
        ("NaN", "an image with NaN or infinity"),
    ],
)
def test_images_of_other_kinds_are_refused(monkeypatch, kind, message):
    monkeypatch.setattr(
        own_data_sets,
        "good",
        lambda: {"train": Numbered(12, WRONG_KINDS[kind]), "test": Numbered(3), "num_classes": 3},
    )
    with pytest.raises(DataError, match=rf"own_data_sets:good, train\[0\]: {message}"):
        load("good")


@pytest.mark.parametrize("label", [np.int32(1), torch.tensor(1), np.array(1), True])
def test_labels_may_be_any_integers(monkeypatch, label):
    monkeypatch.setattr(
        own_data_sets, "good", lambda: dict.fromkeys(("train", "test"), Numbered(6, labels=lambda _: label))
    )
    assert load("good").num_classes == 2


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("cat", "label 'cat', expected an integer"),
        (0.5, "label 0.5, expected an integer"),
        (3, "label 3, expected labels from 0 to 2"),
        (-1, "label -1, expected labels from 0 to 2"),
        (torch.zeros(2), r"label tensor\(\[0., 0.\]\), expected an integer"),
    ],
)
def test_other_labels_are_refused(monkeypatch, label, message):
    data_sets = {"train": Numbered(12), "test": Numbered(3, labels=lambda _: label), "num_classes": 3}
    monkeypatch.setattr(own_data_sets, "good", lambda: data_sets)
    with pytest.raises(DataError, match=rf"own_data_sets:good, test\[0\]: {message}"):
        load("good")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", "own_data_sets:raising: raised RuntimeError: no disk at all"),
        ("with_argument", "raised TypeError: with_argument.. missing 1 required positional argument"),
        ("nothing", "gave None without train and test; expected a dict or an object with train, test"),
        ("without_test", "without test; expected"),
        ("iterable", "train: Endless gives nothing for an index; expected a map-style data set"),
        ("a_list_of_batches", "train: int has no length; expected a map-style data set"),
        ("empty", "test: no examples"),
        ("one_class", "num_classes is 1, expected an integer from 2 on"),
        ("only_zeros", "labels from 0 to 0, expected 0, 1 and so on"),
        ("other_test", r"test\[0\]: an image of shape \(3, 4, 5\) and float32, expected one of .* uint8"),
        ("missing", "own_data_sets has no such name; expected a function without arguments"),
        ("number", "own_data_sets holds 3 there; expected a function"),
    ],
)
def test_what_is_wrong_with_a_factory_is_said(name, message):
    with pytest.raises(DataError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_modules_that_cannot_be_imported_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"nowhere.at_all cannot be imported .ModuleNotFoundError.*PYTHONPATH"
    ):
        load_dataset("nowhere.at_all:make")
    (tmp_path / "broken_module_of_data.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        DataError, match=r"broken_module_of_data cannot be imported .ZeroDivisionError: division by zero.$"
    ):
        load_dataset("broken_module_of_data:make")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("failing", r"train\[5\]: RuntimeError: no such file as this$"),
        ("late_label", r"train\[5\]: label 9, expected labels from 0 to 2$"),
        ("late_shape", r"train\[5\]: an image of shape \(3, 8, 5\) .*, expected one of shape \(3, 4, 5\)"),
    ],
)
def test_an_example_that_fails_later_is_named(name, message, workers):
    data = load(name, workers=workers)
    with pytest.raises(DataError, match=f"own_data_sets:{name}, {message}"):
        list(data.train.part(torch.arange(10)).in_order(3))


def test_a_worker_that_dies_is_an_error():
    split = load("dying", workers=2).train
    with pytest.raises(DataError, match="own_data_sets:dying, train: a process that reads images has died"):
        list(split.in_order(2))


def test_what_is_drawn_depends_on_seed_and_order_and_not_on_processes():
    before = torch.random.get_rng_state()
    orders = [torch.tensor([3, 1, 0]), torch.tensor([2, 5])]

    def drawn(split, keys=orders):
        return torch.cat([batch.images for batch in split.batches(keys)])[:, 0, 0]

    alone, apart, other = (
        load("drawn", workers=workers, seed=seed).test.part(torch.tensor([0, 1, 2, 3, 0, 1]))
        for workers, seed in ((0, 0), (2, 0), (0, 1))
    )
    first, second = drawn(alone), drawn(apart)
    assert len(second[:, 4].unique()) > 1 or second[0, 4] != first[0, 4]  # it was read elsewhere
    assert torch.equal(first[:, :4], second[:, :4])
    assert torch.equal(first, drawn(alone))
    assert not (first[:, 1:4] == drawn(other)[:, 1:4]).any()
    reordered = drawn(alone, [torch.tensor([3, 0, 1]), torch.tensor([5, 2])])
    assert not (first[:, 1:4] == reordered[:, 1:4]).any()
    assert first[:, 1:4].unique().numel() == 15  # each example of a batch draws its own
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_factory_that_draws_gives_the_same_for_a_seed():
    torch.manual_seed(1)
    first = numbers_of(load("split_at_random").test)
    torch.manual_seed(2)
    assert numbers_of(load("split_at_random").test) == first
    assert numbers_of(load("split_at_random", seed=1).test) != first


def test_fingerprints_tell_data_apart_and_repeat():
    def fingerprint(name):
        return [each.tolist() for each in load(name).train.fingerprint()]

    assert fingerprint("good") == fingerprint("good") != fingerprint("as_object")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_prepared(workers):
    split = load("good", workers=workers).test.prepared(lambda images: images.float()[:, :1] / 2, CPU)
    assert split.image_shape == (1, 4, 5)
    assert split.examples(3)[:, 0, 0, 0].tolist() == [0, 0.5, 1]
    assert split.device == CPU


def test_workers_are_as_many_as_cores_at_most():
    assert num_workers(0) == 0
    assert 0 < num_workers(10**6) <= 10**4
    assert num_workers(1) == 1
    assert num_workers(None) in (0, num_workers(10**6))
    with pytest.raises(TypeError, match=r"workers must be an int, got 1\.5"):
        num_workers(1.5)
