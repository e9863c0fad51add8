import gzip
import pickle
import struct
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from idx_files import idx_bytes, random_images, write_idx_folder

from bmrs.data import DATASETS, DataError, check_spec, load_dataset, preprocess
from bmrs.data.cifar import read_cifar10, read_cifar100
from bmrs.data.idx import read_idx, read_idx_images, write_idx
from bmrs.data.make_fashion_mnist_subset import main as make_subset_main
from bmrs.data.make_fashion_mnist_subset import make_subset

CIFAR_BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def cifar_batch(number, count=4):
    generator = np.random.default_rng(number)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), generator.integers(0, 10, count)


def write_cifar_binary(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(CIFAR_BATCHES):
        pixels, labels = cifar_batch(number, count)
        records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


class Python2Pickler(pickle._Pickler):
    """Writes `bytes` as Python 2 wrote `str`, as in the official files."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # noqa: RUF012


def write_python2_pickle(path, value):
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def write_cifar_python(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(CIFAR_BATCHES):
        pixels, labels = cifar_batch(number, count)
        content = {
            b"batch_label": b"batch",
            b"labels": labels.tolist(),
            b"data": pixels,
            b"filenames": [b"a.png"],
        }
        write_python2_pickle(folder / name, content)
    return folder


# IDX


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_folder_is_read_under_every_official_name(tmp_path, end, separator):
    folder = write_idx_folder(tmp_path / "data", end=end, separator=separator)
    images, labels = read_idx_images(folder, "t10k")
    assert images.dtype == torch.uint8
    assert images.shape == (10, 1, 28, 28)
    np.testing.assert_array_equal(images.squeeze(1).numpy(), random_images(10, seed=1))
    assert labels.dtype == torch.int64
    assert labels.tolist() == list(range(10))


def test_gzip_is_recognised_by_content(tmp_path):
    (tmp_path / "no-suffix").write_bytes(gzip.compress(idx_bytes(np.arange(3, dtype=np.uint8))))
    assert read_idx(tmp_path / "no-suffix", dims=1).tolist() == [0, 1, 2]


def test_written_idx_reads_back_and_has_the_same_bytes_each_time(tmp_path):
    values = torch.from_numpy(random_images(3))
    write_idx(tmp_path / "a.gz", values)
    write_idx(tmp_path / "b.gz", values)
    assert torch.equal(read_idx(tmp_path / "a.gz", dims=3), values)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == idx_bytes(values.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content[:-1],
            "truncated: 7839 bytes of data, expected 7840 for shape \\(10, 28, 28\\)",
        ),
        (lambda content: content + b"\0", "too long: more than 7840 bytes of data, expected 7840"),
        (lambda content: content[:10], "truncated header of 10 bytes, expected 16"),
        (lambda content: b"", "magic number missing, expected 00000803"),
        (lambda content: b"\0\0\x0d\x03" + content[4:], "magic number 00000d03, expected 00000803"),
        (lambda content: b"\0\0\x08\x01" + content[4:], "magic number 00000801, expected 00000803"),
        (lambda content: gzip.compress(content)[:-20], "broken or truncated gzip file"),
        (lambda content: b"\x1f\x8b" + content, "broken or truncated gzip file"),
    ],
)
def test_broken_idx_file_is_named_with_what_was_expected(tmp_path, change, message):
    path = write_idx_folder(tmp_path / "data") / "t10k-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"t10k-images-idx3-ubyte: {message}"):
        load_dataset("mnist", path.parent)


@pytest.mark.parametrize("shape", [(10, 28, 28), (2**32 - 1,) * 3])
def test_no_more_is_read_than_the_header_states(tmp_path, shape):
    """Half a gigabyte of zeros in half a megabyte of gzip."""
    path = write_idx_folder(tmp_path / "data") / "t10k-images-idx3-ubyte"
    bomb = gzip.compress(bytes(2**24), compresslevel=1) * 32
    path.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *shape)) + bomb)
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=r"t10k-images-idx3-ubyte: (truncated|too long|\d+ bytes of data for)"
        ):
            read_idx(path, dims=3)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("images-idx3", np.zeros((10, 32, 32), np.uint8), "images of 32×32 pixels, expected 28×28"),
        ("labels-idx1", np.zeros(9, np.uint8), "9 labels for 10 images"),
        ("labels-idx1", np.full(10, 10, np.uint8), "label 10, expected labels from 0 to 9"),
    ],
)
def test_idx_content_that_does_not_fit_is_named(tmp_path, file, values, message):
    path = write_idx_folder(tmp_path / "data") / f"t10k-{file}-ubyte"
    path.write_bytes(idx_bytes(values))
    with pytest.raises(DataError, match=f"{path.name}: {message}"):
        load_dataset("fashion-mnist", path.parent)


def test_empty_data_are_refused(tmp_path):
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: no images"):
        load_dataset("mnist", write_idx_folder(tmp_path / "data", test=0))


def test_missing_idx_file_is_named(tmp_path):
    folder = write_idx_folder(tmp_path / "data")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no file named t10k-labels-idx1-ubyte, .* or .*idx1-ubyte.gz"
    ):
        load_dataset("mnist", folder)


# CIFAR-10


@pytest.mark.parametrize(
    ("write", "inner"),
    [(write_cifar_binary, "cifar-10-batches-bin"), (write_cifar_python, "cifar-10-batches-py")],
)
@pytest.mark.parametrize("nested", [True, False])
def test_cifar10_is_read_in_both_versions(tmp_path, write, inner, nested):
    folder = write(tmp_path / inner)
    (train_images, train_labels), (test_images, test_labels) = read_cifar10(tmp_path if nested else folder)
    assert train_images.shape == (20, 3, 32, 32)
    assert train_images.dtype == torch.uint8
    assert train_labels.dtype == torch.int64
    for number in range(5):
        pixels, labels = cifar_batch(number)
        np.testing.assert_array_equal(train_images[4 * number : 4 * number + 4].flatten(1).numpy(), pixels)
        assert train_labels[4 * number : 4 * number + 4].tolist() == labels.tolist()
    pixels, labels = cifar_batch(5)
    np.testing.assert_array_equal(test_images.flatten(1).numpy(), pixels)
    assert test_labels.tolist() == labels.tolist()


def test_cifar10_folder_without_batches_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 here; expected data_batch_1\.bin"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("write", "end"), [(write_cifar_binary, ".bin"), (write_cifar_python, "")])
def test_missing_cifar10_batch_is_named(tmp_path, write, end):
    folder = write(tmp_path / "data")
    (folder / f"data_batch_3{end}").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        load_dataset("cifar10", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content[:-1],
            "truncated or no CIFAR-10 batch: 12291 bytes, expected a multiple of 3073",
        ),
        (lambda content: b"", "truncated or no CIFAR-10 batch: 0 bytes"),
        (lambda content: content[:-3073], "3 images, expected 4 as in the first batch"),
        (lambda content: b"\x0a" + content[1:], "label 10, expected labels from 0 to 9"),
    ],
)
def test_broken_binary_cifar10_batch_is_named(tmp_path, change, message):
    path = write_cifar_binary(tmp_path / "data") / "data_batch_2.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"data_batch_2.bin: {message}"):
        load_dataset("cifar10", path.parent)


def python_batch(**change):
    pixels, labels = cifar_batch(1)
    batch = {b"data": pixels, b"labels": labels.tolist()}
    return {**batch, **{key.encode(): value for key, value in change.items()}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary with the keys"),
        ({b"data": 1}, "expected a dictionary with the keys"),
        (python_batch(data=[1, 2]), "b'data' is list, expected uint8"),
        (
            python_batch(data=np.zeros((4, 3072), np.int16)),
            "b'data' is i2 of shape \\(4, 3072\\), expected uint8",
        ),
        (
            python_batch(data=np.zeros((4, 100), np.uint8)),
            "b'data' is uint8 of shape \\(4, 100\\), expected uint8",
        ),
        (python_batch(labels=[1, 2, 3]), "3 labels for 4 images"),
        (python_batch(labels=[1, 2, 3, -1]), "label -1, expected labels from 0 to 9"),
        (
            python_batch(labels=[1, 2, 3, 10**30]),
            "label 1000000000000000000000000000000, expected labels from",
        ),
        (python_batch(labels=[1, 2, 3, -(10**5000)]), "label a value of type int that is too long to show"),
        (python_batch(data=np.array([[None] * 3072] * 4)), "b'data' is O8 of shape"),
        (python_batch(data=np.zeros((4, 32, 96), np.uint8)), "b'data' is uint8 of shape \\(4, 32, 96\\)"),
        (python_batch(labels=["a", 1, 2, 3]), "b'labels' is no list of integers"),
    ],
)
def test_broken_python_cifar10_batch_is_named(tmp_path, content, message):
    path = write_cifar_python(tmp_path / "data") / "data_batch_2"
    write_python2_pickle(path, content)
    with pytest.raises(DataError, match=f"data_batch_2: {message}"):
        load_dataset("cifar10", path.parent)


def test_cifar10_pixels_are_read_in_fortran_order_too(tmp_path):
    path = write_cifar_python(tmp_path / "data") / "data_batch_2"
    expected = read_cifar10(path.parent)[0][0]
    write_python2_pickle(path, python_batch(data=np.asfortranarray(cifar_batch(1)[0])))
    assert torch.equal(read_cifar10(path.parent)[0][0], expected)


class ForgedDType:
    def __init__(self, forged):
        self.forged = forged

    def __reduce__(self):
        return np.dtype, self.forged.dtype, self.forged.dtype_state


class Forged:
    """Pickled as an array whose shape, dtype and bytes do not belong together."""

    def __init__(self, state, dtype=("u1", False, True), dtype_state=(3, "|", None, None, None, -1, -1, 0)):
        self.state, self.dtype, self.dtype_state = state, dtype, dtype_state

    def __reduce__(self):
        version, shape, order, content = self.state
        function, _, _ = np.zeros(1, np.uint8).__reduce__()
        return function, (np.ndarray, (0,), b"b"), (version, shape, ForgedDType(self), order, content)


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (Forged((1, (4, 3072), False, b"")), "b'data' has not the 12288 bytes of its shape"),
        (Forged((1, (-1, 3072), False, b"")), "b'data' is uint8 of shape"),
        (Forged((1, (10**30, 3072), False, b"")), "b'data' has not the"),
        (Forged((1, (4, 3072), False, [1])), "b'data' has not the 12288 bytes"),
        (Forged((1, "x", False, b"")), "b'data' is u1 of shape 'x'"),
        # NumPy takes these eight bytes for an address, and goes there.
        (
            Forged((1, (1,), False, b"\x41" * 8), ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)),
            "b'data' is O8 of shape",
        ),
    ],
)
def test_forged_arrays_are_refused(tmp_path, forged, message):
    path = write_cifar_python(tmp_path / "data") / "data_batch_2"
    write_python2_pickle(path, {b"data": forged, b"labels": [1, 2, 3, 4]})
    with pytest.raises(DataError, match=f"data_batch_2: {message}"):
        load_dataset("cifar10", path.parent)


def test_a_cifar10_file_of_any_size_is_not_read(tmp_path):
    path = write_cifar_binary(tmp_path / "data") / "data_batch_2.bin"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(DataError, match=r"data_batch_2.bin: 1099511627776 bytes, expected at most"):
        load_dataset("cifar10", path.parent)


def test_truncated_cifar10_pickle_is_named(tmp_path):
    path = write_cifar_python(tmp_path / "data") / "test_batch"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="test_batch: broken or truncated pickle"):
        load_dataset("cifar10", path.parent)


class Payload:
    def __reduce__(self):
        return threading.Event, ()


def test_cifar10_pickle_with_code_is_refused_unexecuted(tmp_path):
    path = write_cifar_python(tmp_path / "data") / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": Payload()}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_1: pickle refers to threading\.Event"):
        load_dataset("cifar10", path.parent)


def test_cifar10_pickle_cannot_build_other_types_as_arrays(tmp_path):
    path = write_cifar_python(tmp_path / "data") / "data_batch_1"
    path.write_bytes(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.")
    with pytest.raises(DataError, match="an array of another type than numpy"):
        load_dataset("cifar10", path.parent)


# CIFAR-100


def cifar100_part(number):
    count = {"train": 10, "test": 2}[number]
    generator = np.random.default_rng(count)
    pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, generator.integers(0, 20, count), generator.integers(0, 100, count)


def write_cifar100_binary(folder):
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        pixels, coarse, fine = cifar100_part(name)
        records = np.concatenate([np.stack([coarse, fine], axis=1).astype(np.uint8), pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def write_cifar100_python(folder):
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        pixels, coarse, fine = cifar100_part(name)
        labels = {b"coarse_labels": coarse.tolist(), b"fine_labels": fine.tolist()}
        write_python2_pickle(folder / name, {b"data": pixels, **labels})
    return folder


@pytest.mark.parametrize(
    ("write", "inner"),
    [(write_cifar100_binary, "cifar-100-binary"), (write_cifar100_python, "cifar-100-python")],
)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("coarse", [True, False])
def test_cifar100_is_read_in_both_versions(tmp_path, write, inner, nested, coarse):
    folder = write(tmp_path / inner)
    parts = read_cifar100(tmp_path if nested else folder, coarse=coarse)
    for name, (images, labels) in zip(("train", "test"), parts, strict=True):
        pixels, *both = cifar100_part(name)
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 32, 32)
        np.testing.assert_array_equal(images.flatten(1).numpy(), pixels)
        assert labels.tolist() == both[not coarse].tolist()
    data = load_dataset("cifar100-coarse" if coarse else "cifar100", folder)
    assert data.num_classes == (20 if coarse else 100)
    assert [len(data.train), len(data.validation), len(data.test)] == [8, 2, 2]


@pytest.mark.parametrize(
    ("write", "name", "change", "message"),
    [
        (
            write_cifar100_binary,
            "test.bin",
            lambda content: content[:-1],
            "truncated or no CIFAR-100 batch: 6147 bytes, expected a multiple of 3074 .2 label bytes",
        ),
        (
            write_cifar100_binary,
            "train.bin",
            lambda content: content[:3074],
            "2 images, expected 0.2 for the 1",
        ),
        (
            write_cifar100_binary,
            "train.bin",
            lambda content: b"\0\x64" + content[2:],
            "label 100, expected labels from 0 to 99",
        ),
        (write_cifar100_python, "train", lambda content: content[:100], "broken or truncated pickle"),
        (
            write_cifar100_python,
            "train",
            lambda content: content.replace(b"fine_labels", b"nine_labels"),
            "expected a dictionary with the keys b'data' and b'fine_labels'",
        ),
        (
            write_cifar100_python,
            "test",
            lambda content: pickle.dumps({"data": Payload()}, protocol=2),
            r"pickle refers to threading\.Event",
        ),
    ],
)
def test_a_broken_cifar100_file_is_named(tmp_path, write, name, change, message):
    path = write(tmp_path / "data") / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load_dataset("cifar100", path.parent)


def test_cifar100_without_its_files_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no CIFAR-100 here; expected train\.bin .* cifar-100-python"
    ):
        load_dataset("cifar100", tmp_path)
    (write_cifar100_binary(tmp_path / "data") / "test.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.bin: missing; CIFAR-100 has train and test"):
        load_dataset("cifar100", tmp_path / "data")


# Data sets


def test_embedded_data_are_balanced_and_split():
    dataset = load_dataset("fashion-mnist-subset")
    assert dataset.name == "fashion-mnist-subset"
    assert dataset.num_classes == 10
    assert dataset.channels == 1
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (4800, 1200, 2000)
    everything = torch.cat([dataset.train.labels, dataset.validation.labels])
    assert everything.bincount().tolist() == [600] * 10
    assert dataset.test.labels.bincount().tolist() == [200] * 10
    # Real pictures: no two alike, neither black nor white.
    means = dataset.train.images.float().mean(dim=(1, 2, 3))
    assert means.unique().numel() > 4000
    assert 60 < means.mean() < 90


def test_split_depends_on_the_seed_only_and_loses_nothing(tmp_path):
    folder = write_idx_folder(tmp_path / "data", train=50)
    first, again, other = (load_dataset("mnist", folder, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    assert len(first.validation) == 10
    both = torch.cat([first.train.images, first.validation.images]).flatten(1)
    expected = torch.from_numpy(random_images(50)).flatten(1)
    assert sorted(both.tolist()) == sorted(expected.tolist())
    # Labels go with their images.
    rows = {
        tuple(row): label for row, label in zip(expected.tolist(), [i % 10 for i in range(50)], strict=True)
    }
    assert all(
        rows[tuple(image.flatten().tolist())] == label
        for image, label in zip(first.validation.images, first.validation.labels.tolist(), strict=True)
    )


def test_too_few_images_to_split_are_refused(tmp_path):
    with pytest.raises(DataError, match="2 training images, 0 of them for validation"):
        load_dataset("mnist", write_idx_folder(tmp_path / "data", train=2))


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"name must be one of fashion-mnist-subset, mnist, .* got 'imagenet'"
    ):
        load_dataset("imagenet")
    with pytest.raises(ValueError, match="folder is missing: mnist is read from the folder"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="but fashion-mnist-subset comes with the package"):
        load_dataset("fashion-mnist-subset", tmp_path)
    with pytest.raises(ValueError, match=r"must be between 0 and 1, got 1.0"):
        load_dataset("fashion-mnist-subset", validation_fraction=1.0)
    with pytest.raises(
        FileNotFoundError, match="nowhere: no such folder; expected the official files of mnist"
    ):
        load_dataset("mnist", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="name must be one of"):
        preprocess(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), name="imagenet")


@pytest.mark.parametrize("name", DATASETS)
def test_preprocessing_follows_the_paper(name):
    size, channels = (32, 3) if name == "cifar10" else (28, 1)
    levels = torch.tensor([0, 127, 255], dtype=torch.uint8)
    images = levels.view(3, 1, 1, 1).expand(3, channels, size, size)
    result = preprocess(images, name=name)
    assert result.dtype == torch.float32
    assert result.shape == (3, channels, 32, 32)
    pixels = levels.float()
    expected = pixels / 127.5 - 1 if name == "cifar10" else (pixels - 127) / 255
    torch.testing.assert_close(result, expected.view(3, 1, 1, 1).expand_as(result))


def test_resizing_interpolates_linearly():
    ramp = torch.arange(28, dtype=torch.uint8).mul(9).expand(1, 1, 28, 28)
    result = preprocess(ramp, name="mnist")[0, 0, 0] * 255 + 127
    # Pixel centres: (i + 0.5) · 28/32 − 0.5, clamped at the border.
    expected = ((torch.arange(32) + 0.5) * 28 / 32 - 0.5).clamp(0, 27) * 9
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-3)


# The script that made the embedded data


def test_subset_script_is_deterministic_and_balanced(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for split, count in (("train", 7000), ("t10k", 3000)):
        labels = np.random.default_rng(count).permutation(np.arange(count) % 10).astype(np.uint8)
        # The first two pixels hold the image's number, to recognise it afterwards.
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
        (source / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (source / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    make_subset(source, tmp_path / "first")
    make_subset_main([str(source), str(tmp_path / "second")])
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()

    for split, per_class in (("train", 600), ("t10k", 200)):
        images, labels = read_idx_images(tmp_path / "first", split)
        numbers = images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1].long()
        assert labels.bincount().tolist() == [per_class] * 10
        assert (numbers.diff() > 0).all()
        original = read_idx_images(source, split)[1]
        assert torch.equal(original[numbers], labels)


def test_subset_script_refuses_a_source_with_too_few_images(tmp_path):
    with pytest.raises(DataError, match="2 images of class 0, expected at least 600"):
        make_subset(write_idx_folder(tmp_path / "data"), tmp_path / "out")


@pytest.mark.parametrize("name", DATASETS)
def test_images_are_prepared_at_other_sizes(name):
    images = torch.full((2, 3 if name == "cifar10" else 1, 28, 28), 127, dtype=torch.uint8)
    assert preprocess(images, name=name, image_size=48).shape[-2:] == (48, 48)


def test_the_size_for_the_network_is_noted_and_images_stay_as_they_are(tmp_path):
    folder = write_idx_folder(tmp_path / "data")
    assert load_dataset("mnist", folder).image_size == 32
    data = load_dataset("mnist", folder, image_size=48)
    assert data.image_size == 48
    assert data.train.image_shape == (1, 28, 28)


@pytest.mark.parametrize(
    "spec", [*DATASETS, "cifar100", "tiny-imagenet", "folder:x", "folder:/a b/é", "a.b:c", "m:f"]
)
def test_what_names_data_is_known(spec):
    check_spec(spec)


@pytest.mark.parametrize("spec", ["imagenet", "folder:", "a.b:", ":c", "a b:c", "a:b:c", "1:f", "", None, 3])
def test_what_names_no_data_is_told_what_would(spec):
    with pytest.raises(
        ValueError,
        match=r"--data must be one of fashion-mnist-subset, .*folder:DIR .*package.module:factory .*got",
    ):
        check_spec(spec, option="--data")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("folder:x", {"folder": "x"}, ValueError, "folder is 'x', but folder:x says where it is"),
        ("a.b:c", {"folder": "x"}, ValueError, "folder is 'x', but a.b:c says where it is"),
        ("a.b:c", {"image_size": 8}, ValueError, "image_size and channels must be None for a.b:c"),
        ("tiny-imagenet", {}, ValueError, "folder is missing: tiny-imagenet"),
        ("folder:x", {"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
        ("folder:x", {"channels": 2}, ValueError, "channels must be one of None, 1, 3, got 2"),
        ("folder:x", {"test_fraction": 0}, ValueError, "test_fraction must be between 0 and 1, got 0"),
        ("folder:.", {"workers": -1}, ValueError, "workers must be at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        load_dataset(name, **options)
