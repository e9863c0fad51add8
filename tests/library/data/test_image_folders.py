import errno
import os
import shutil
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_folders import pixels, write_classes, write_image
from PIL import Image

from bmrs.data import DataError, MappedSplit, image_cache, load_dataset
from bmrs.data.image_files import UnreadableImageError, read_image


@pytest.fixture
def load(tmp_path):
    def load(folder, **options):
        options = {"image_size": 16, "workers": 0, "cache": tmp_path / "cache", **options}
        return load_dataset(f"folder:{folder}", **options)

    return load


@pytest.fixture
def animals(tmp_path):
    return write_classes(tmp_path / "animals")


def images_of(split):
    (batch,) = split.in_order(len(split))
    return batch


def seeds_of(split, channels=3, size=16):
    """Which of the written images a split has, in its order."""
    known = {pixels(seed, size, channels).tobytes(): seed for seed in range(40)}
    return [known[image.permute(1, 2, 0).numpy().tobytes()] for image in images_of(split).images]


# Layouts


def test_classes_alone_are_cut_into_three_splits(load, animals):
    data = load(animals, seed=3)
    assert data.classes == ("ant", "bee")
    assert data.num_classes == 2
    assert data.image_size == 16
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [8, 2, 2]
    # Every image once, each class in each split, labels with their images.
    assert sorted(seed for split in splits for seed in seeds_of(split)) == list(range(12))
    for split in splits:
        labels = images_of(split).labels
        assert labels.dtype == torch.int64
        assert [seed // 6 for seed in seeds_of(split)] == labels.tolist()
        assert labels.bincount().tolist() == [len(split) // 2] * 2
        assert split.image_shape == (3, 16, 16)


def test_the_seed_chooses_validation_images_but_not_test_images(load, tmp_path):
    folder = write_classes(tmp_path / "data", images=20)
    first, again, other = (load(folder, seed=seed) for seed in (1, 1, 2))
    assert seeds_of(first.validation) == seeds_of(again.validation) != seeds_of(other.validation)
    assert seeds_of(first.test) == seeds_of(other.test)
    assert len(load(folder, test_fraction=0.5, validation_fraction=0.1).test) == 20


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_splits_of_the_folder_are_taken_as_they_are(load, tmp_path, name):
    write_classes(tmp_path / "data" / "train", images=4)
    write_classes(tmp_path / "data" / name, images=1, first=10)
    write_classes(tmp_path / "data" / "test", images=2, first=20)
    data = load(tmp_path / "data")
    assert sorted(seeds_of(data.train)) == list(range(8))
    # Files lie class by class, and whoever takes the first ones as examples has to meet all classes.
    assert data.train.labels.tolist() != sorted(data.train.labels.tolist())
    assert seeds_of(data.validation) == [10, 11]
    assert seeds_of(data.test) == [20, 21, 22, 23]
    shutil.rmtree(tmp_path / "data" / name)
    without = load(tmp_path / "data")
    assert [len(without.train), len(without.validation), len(without.test)] == [6, 2, 4]


def test_the_folder_may_be_in_ones_home(load, animals, monkeypatch):
    monkeypatch.setenv("HOME", str(animals.parent))
    assert load("~/animals").classes == ("ant", "bee")


def test_images_lie_deeper_and_behind_links(load, animals, tmp_path):
    write_image(animals / "ant" / "more" / "deep" / "a.JPEG", 30)
    write_classes(tmp_path / "elsewhere", ["cat"])
    (animals / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    data = load(animals)
    assert data.classes == ("ant", "bee", "cat")
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 19


def test_a_class_may_be_called_train(load, tmp_path):
    assert load(write_classes(tmp_path / "data", ["plane", "train"])).classes == ("plane", "train")


def no_classes(folder):
    write_image(folder / "a.png")
    write_image(folder / "b.png")


def one_class(folder):
    write_classes(folder, ["ant"])


def empty_class(folder):
    (write_classes(folder) / "cat").mkdir()


def class_of_text(folder):
    empty_class(folder)
    (folder / "cat" / "readme.txt").write_text("x")


def other_test_classes(folder):
    write_classes(folder / "train")
    write_classes(folder / "test", ["ant", "cow"])


def test_without_train(folder):
    write_classes(folder / "test")
    write_classes(folder / "val")


test_without_train.__test__ = False


def train_without_classes(folder):
    write_image(folder / "train" / "a.png")
    write_image(folder / "test" / "a.png")


def two_validations(folder):
    for name in ("train", "val", "valid"):
        write_classes(folder / name)


def classes_beside_train(folder):
    write_classes(folder)
    write_classes(folder / "train")


def link_in_a_circle(folder):
    (write_classes(folder) / "ant" / "again").symlink_to(folder)


def link_to_itself(folder):
    (write_classes(folder) / "ant" / "a.png").symlink_to(folder / "ant" / "a.png")


def tiny_imagenet_itself(folder):
    write_classes(folder / "val")
    (folder / "wnids.txt").write_text("n1")


def one_image_of_a_class(folder):
    write_image(write_classes(folder) / "cat" / "a.png")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder.mkdir(), "data: no images; expected a folder of images for each class"),
        (no_classes, r"data: 2 images \(a.png, b.png\) without classes; expected a folder"),
        (one_class, "data: only the class 'ant'; expected a folder for each of 2 or more classes"),
        (empty_class, "data/cat: no images of this class"),
        (class_of_text, "data/cat: no images of this class"),
        (
            other_test_classes,
            r"data/test: lacks 1 class \(bee\) and has 1 class \(cow\) that the training images lack",
        ),
        (test_without_train, r"data: 2 folders \(test, val\), but no train"),
        (train_without_classes, "data/train: no class folders; expected train/<class>/<image>"),
        (two_validations, "data: val and valid both are validation images; expected one of them"),
        (classes_beside_train, r"data: 2 folders \(ant, bee\) beside train: expected train, val and test"),
        (link_in_a_circle, "data/ant/again.*: a symbolic link to a folder that it lies in"),
        (link_to_itself, "data/ant/a.png: cannot be read"),
        (tiny_imagenet_itself, "data: this is TinyImageNet as it is distributed: read it as tiny-imagenet"),
        (one_image_of_a_class, "data, test: is cut off .* class 'cat' has 1 of them; expected 2 or more"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(load, tmp_path, write, message):
    write(tmp_path / "data")
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path / "data")
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; expected one with a folder"):
        load(tmp_path / "nowhere")


def test_other_files_are_left_out_and_counted(load, animals):
    assert load(animals).notes == ()
    (animals / "ant" / "notes.txt").write_text("x")
    write_image(animals / "bee" / ".hidden.png")
    os.mkfifo(animals / "bee" / "pipe.png")  # reading it would wait for ever
    write_image(animals / "loose.png")
    data = load(animals)
    assert len(data.train) == 8
    ignored, stray = data.notes
    assert "left out 3 files (ant/notes.txt, bee/.hidden.png, bee/pipe.png), hidden or of no" in ignored
    assert "left out 1 image (loose.png), which lie in no class folder" in stray


# Files


def test_pixels_are_the_centre_of_the_image_at_the_size(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = (10, 200, 90)
    Image.fromarray(picture).save(tmp_path / "a.png")
    image, converted = read_image(tmp_path / "a.png", image_size=10, channels=3)
    assert image.shape == (3, 10, 10)
    assert image.dtype == np.uint8
    assert not converted
    np.testing.assert_array_equal(image, np.broadcast_to(np.array([[[10]], [[200]], [[90]]]), (3, 10, 10)))


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    Image.fromarray(pixels(0)).save(tmp_path / "a.png", exif=exif)
    image, _ = read_image(tmp_path / "a.png", image_size=16, channels=3)
    np.testing.assert_array_equal(image.transpose(1, 2, 0), np.rot90(pixels(0), -1))


def test_broken_camera_data_do_not_matter(tmp_path):
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01", b"Exif\0\0nonsense"):
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "a.jpg", exif=exif)
        image, _ = read_image(tmp_path / "a.jpg", image_size=4, channels=3)
        assert (image == 90).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "gif", "tif", "ppm", "tga"])
def test_formats_are_read_close_to_what_was_written(tmp_path, suffix):
    smooth = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[:, None], 16, 1)
    Image.fromarray(smooth).convert("RGB").save(tmp_path / f"a.{suffix}")
    image, _ = read_image(tmp_path / f"a.{suffix}", image_size=16, channels=3)
    assert np.abs(image.astype(int) - smooth).max() < 20


def test_sixteen_bits_and_palettes_are_brought_to_eight(tmp_path):
    Image.fromarray(pixels(0, channels=1).astype(np.uint16) * 256 + 7).save(tmp_path / "deep.png")
    image, _ = read_image(tmp_path / "deep.png", image_size=16, channels=1)
    np.testing.assert_array_equal(image[0], pixels(0, channels=1))
    few = Image.fromarray(pixels(0) // 128 * 128).quantize(8)
    few.save(tmp_path / "few.png", transparency=0)
    image, _ = read_image(tmp_path / "few.png", image_size=16, channels=3)
    np.testing.assert_array_equal(image.transpose(1, 2, 0), pixels(0) // 128 * 128)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def bomb(path):
    Image.new("1", (12_000, 12_000)).save(path)


def disguised(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncated, "truncated"),
        (lambda path: path.write_bytes(b""), "cannot identify image file the file"),
        (lambda path: path.write_bytes(b"text"), "cannot identify"),
        (bomb, r"144000000 pixels\) exceeds limit"),
        (disguised, "cannot identify"),
        (lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF"), "32-bit numbers"),
        (lambda path: Image.fromarray(np.ones((4, 4), np.int32)).save(path, "TIFF"), "32-bit numbers"),
    ],
)
def test_what_is_no_image_is_an_error_of_one_line(tmp_path, harm, message):
    path = write_image(tmp_path / "a.png")
    harm(path)
    with pytest.raises(UnreadableImageError, match=message) as error:
        read_image(path, image_size=16, channels=3)
    assert "\n" not in str(error.value)


def test_unreadable_images_are_named_and_counted(load, animals):
    for name in ("ant/000", "ant/001", "bee/005"):
        truncated(animals / f"{name}.png")
    (animals / "bee" / "lost.png").symlink_to(animals / "nowhere")
    with pytest.raises(
        DataError, match=r"animals: cannot read 4 images \(ant/000.png: .*--skip-unreadable true"
    ):
        load(animals)


def test_unreadable_images_are_left_out_if_that_is_wanted(load, animals):
    whole = load(animals)
    truncated(animals / "ant" / "000.png")
    data = load(animals, skip_unreadable=True)
    assert [note for note in data.notes if "left out 1 image (ant/000.png) that cannot be read" in note]
    splits = (data.train, data.validation, data.test)
    assert sorted(seed for split in splits for seed in seeds_of(split)) == list(range(1, 12))
    for split in splits:
        assert [seed // 6 for seed in seeds_of(split)] == images_of(split).labels.tolist()
    # Read from the cache it is the same, and no less an error for those who did not ask for that.
    assert load(animals, skip_unreadable=True).notes == data.notes
    with pytest.raises(DataError, match=r"cannot read 1 image \(ant/000.png"):
        load(animals)
    assert whole.notes == ()


def test_a_class_that_cannot_be_read_at_all_is_an_error(load, animals):
    for path in (animals / "bee").iterdir():
        truncated(path)
    with pytest.raises(DataError, match=r"no image of 1 class \(bee\) can be read in train"):
        load(animals, skip_unreadable=True)


@pytest.mark.parametrize(
    ("grey", "coloured", "channels", "expected", "note"),
    [
        (6, 4, None, 1, "4 of 10 images were coloured and made grey"),
        (4, 6, None, 3, "4 of 10 images were grey and made RGB"),
        (6, 4, 3, 3, "6 of 10 images were grey and made RGB"),
        (4, 6, 1, 1, "6 of 10 images were coloured and made grey"),
        (10, 0, None, 1, None),
    ],
)
def test_images_get_the_channels_of_most_of_them(load, tmp_path, grey, coloured, channels, expected, note):
    for number in range(grey + coloured):
        name = "ab"[number % 2]
        write_image(tmp_path / "data" / name / f"{number}.png", channels=1 if number < grey else 3)
    data = load(tmp_path / "data", channels=channels)
    assert data.channels == expected
    assert len(data.notes) == (note is not None)
    if note:
        assert data.notes[0].endswith(note)


# The cache


def test_images_are_read_once_until_a_file_changes(load, animals, tmp_path):
    seen = []
    first = load(animals, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 12) for number in range(1, 13)]
    again = load(animals, progress=lambda done, total: pytest.fail("read again"))
    assert seeds_of(again.train) == seeds_of(first.train)
    write_image(animals / "bee" / "000.png", 39)
    changed = load(animals)
    assert 39 in [
        seed for split in (changed.train, changed.validation, changed.test) for seed in seeds_of(split)
    ]
    assert seeds_of(first.train) == seeds_of(again.train)  # what was mapped before goes on
    # One array a folder and size; what was superseded is gone.
    load(animals, image_size=8)
    assert len(list((tmp_path / "cache").rglob("images.npy"))) == 2


def test_images_are_mapped_and_not_held(load, tmp_path):
    folder = write_classes(tmp_path / "data", images=100)
    size = 200 * 128 * 128 * 3
    read_image(folder / "ant" / "000.png", image_size=128, channels=3)  # imports Pillow's readers
    for _ in ("read", "from the cache"):
        tracemalloc.start()
        data = load(folder, image_size=128)
        for batch in data.train.in_order(10):
            assert batch.images.shape == (len(batch.labels), 3, 128, 128)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert isinstance(data.train, MappedSplit)
        assert isinstance(data.train.array, np.memmap)
        assert peak < size / 3


def test_worker_processes_read_the_same(load, tmp_path):
    folder = write_classes(tmp_path / "data", images=32)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    apart = load(folder, workers=2, cache=tmp_path / "other")
    here = load(folder)
    assert torch.equal(images_of(apart.train).images, images_of(here.train).images)
    # Whether the images were in the cache does not change what is drawn afterwards.
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interruption_leaves_no_half_cache(load, animals, tmp_path, monkeypatch, error):
    def interrupted(done, total):
        if done == 7:
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else DataError) as raised:
        load(animals, progress=interrupted)
    if error is not KeyboardInterrupt:
        assert "No space left on device); choose another folder with cache" in str(raised.value)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]
    assert len(load(animals).train) == 8


def test_too_little_space_is_said_before_reading(load, animals, monkeypatch):
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(DataError, match=r"12 images of 16×16 pixels take 0.0 GB there, and 0.0 GB are free"):
        load(animals, progress=lambda done, total: pytest.fail("began to read"))


def test_a_cache_that_cannot_be_written_is_named(load, animals, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"file.*: images cannot be kept there .*choose another folder with cache"
    ):
        load(animals, cache=tmp_path / "file")


@pytest.mark.parametrize("name", ["images.npy", "index.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_damaged_cache_is_made_anew(load, animals, tmp_path, name, content):
    expected = seeds_of(load(animals).train)
    (path,) = (tmp_path / "cache").rglob(name)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert seeds_of(load(animals).train) == expected


def test_two_at_once_read_once(load, animals):
    reading, results = [], []

    def one():
        results.append(load(animals, progress=lambda done, total: reading.append(done)))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reading) == 12
    assert len({tuple(seeds_of(data.train)) for data in results}) == 1


def test_the_cache_is_the_users_if_none_is_named(animals, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(image_cache.sys, "platform", "linux")
    load_dataset(f"folder:{animals}", image_size=8, workers=0)
    assert list((tmp_path / "user" / "bmrs" / "images").iterdir())


def test_without_pillow_the_hint_is_clear(load, animals, monkeypatch):
    from bmrs.data import image_files

    image_files.image_suffixes.cache_clear()
    monkeypatch.setitem(image_cache.sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="Pillow, which is missing: pip install pillow"):
        load(animals)


# TinyImageNet


@pytest.fixture
def tiny_imagenet(tmp_path):
    root = tmp_path / "archive" / "tiny-imagenet-200"
    names = ("n02", "n01")
    lines = []
    for place, name in enumerate(names):
        for number in range(5):
            write_image(root / "train" / name / "images" / f"{name}_{number}.png", place * 5 + number)
        (root / "train" / name / f"{name}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t9\t9\n")
        write_image(root / "val" / "images" / f"val_{place}.png", 20 + place)
        lines.append(f"val_{place}.png\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(names) + "\n")
    write_image(root / "test" / "images" / "test_0.png", 39)
    return root


@pytest.mark.parametrize("inner", [True, False])
def test_tiny_imagenet_is_read_as_it_is_distributed(tiny_imagenet, tmp_path, inner):
    folder = tiny_imagenet if inner else tiny_imagenet.parent
    data = load_dataset("tiny-imagenet", folder, image_size=16, workers=0, cache=tmp_path / "cache")
    assert data.classes == ("n01", "n02")
    assert data.notes == ()
    assert seeds_of(data.test) == [20, 21]
    assert images_of(data.test).labels.tolist() == [1, 0]
    assert [len(data.train), len(data.validation)] == [8, 2]
    assert sorted(seeds_of(data.train) + seeds_of(data.validation)) == list(range(10))
    assert [int(seed < 5) for seed in seeds_of(data.train)] == images_of(data.train).labels.tolist()


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (
            lambda root: (root / "wnids.txt").unlink(),
            FileNotFoundError,
            "wnids.txt: missing; TinyImageNet has",
        ),
        (lambda root: (root / "wnids.txt").write_text("n01"), DataError, "1 classes, expected 2 or more"),
        (
            lambda root: (root / "wnids.txt").write_text("n01\nn02\nn03"),
            DataError,
            r"train: lacks 1 class \(n03\)",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.png n01"),
            DataError,
            "val_annotations.txt, line 1: expected a file name, a tab and a class",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("../../x.png\tn01"),
            DataError,
            "val_annotations.txt, line 1",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_9.png\tn01"),
            DataError,
            r"cannot read 1 image \(val/images/val_9.png",
        ),
    ],
)
def test_a_broken_tiny_imagenet_is_named(tiny_imagenet, tmp_path, harm, error, message):
    harm(tiny_imagenet)
    with pytest.raises(error, match=message):
        load_dataset("tiny-imagenet", tiny_imagenet, workers=0, cache=tmp_path / "cache")
