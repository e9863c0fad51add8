import math

import pytest
import torch

from bmrs.data import IMAGENET, DataError, Normalization, TensorSplit, augment, normalization_of, resized


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


IMAGES = torch.arange(1, 1 + 64 * 2 * 5 * 4).reshape(64, 2, 5, 4)


def moved(image, down, right):
    """The image seen through a window that was moved, over a black margin."""
    wide = torch.nn.functional.pad(image, (4, 4, 4, 4))
    return wide[:, 4 + down : 4 + down + image.shape[1], 4 + right : 4 + right + image.shape[2]]


def test_crops_are_windows_of_the_image_in_its_margin():
    crops = augment(IMAGES, padding=2, flip=False, generator=generator())
    assert crops.shape == IMAGES.shape
    assert crops.dtype == IMAGES.dtype
    moves = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    found = []
    for image, crop in zip(IMAGES, crops, strict=True):
        (move,) = [move for move in moves if torch.equal(moved(image, *move), crop)]
        found.append(move)
    # Both ends are reached, and images move apart from each other.
    assert {down for down, _ in found} == {right for _, right in found} == {-2, -1, 0, 1, 2}
    assert len(set(found)) > 15


def test_about_half_of_the_images_are_mirrored():
    flipped = augment(IMAGES, padding=0, flip=True, generator=generator())
    mirrored = [torch.equal(new, image.flip(2)) for image, new in zip(IMAGES, flipped, strict=True)]
    unchanged = [torch.equal(new, image) for image, new in zip(IMAGES, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, unchanged, strict=True))
    assert 20 < sum(mirrored) < 44
    assert torch.equal(augment(IMAGES, padding=0, flip=False, generator=generator()), IMAGES)


def test_crops_and_mirrors_go_together():
    both = augment(IMAGES, padding=1, flip=True, generator=generator())
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    for image, new in zip(IMAGES, both, strict=True):
        windows = [window for move in moves for window in (moved(image, *move), moved(image, *move).flip(2))]
        assert sum(torch.equal(window, new) for window in windows) == 1


def test_choices_are_those_of_the_generator():
    source = generator()
    state = source.get_state()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = augment(IMAGES, padding=2, flip=True, generator=source)
    second = augment(IMAGES, padding=2, flip=True, generator=source)
    assert not torch.equal(first, second)
    source.set_state(state)
    assert torch.equal(
        augment(IMAGES.to(torch.uint8), padding=2, flip=True, generator=source), first.to(torch.uint8)
    )
    assert torch.equal(augment(IMAGES, padding=2, flip=True, generator=source), second)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_wrong_paddings_are_named():
    with pytest.raises(ValueError, match="padding must be at least 0, got -1"):
        augment(IMAGES, padding=-1, flip=False, generator=generator())


def test_resizing_keeps_the_range_and_what_has_the_size():
    images = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
    torch.testing.assert_close(resized(images, 5), torch.full((2, 3, 5, 5), 0.2))
    torch.testing.assert_close(resized(images.float(), 16), torch.full((2, 3, 16, 16), 51.0))
    assert resized(images, 8) is images


def test_normalization_is_by_channel_and_of_uint8_or_shares():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    scaled = IMAGENET(images)
    assert scaled.dtype == torch.float32
    expected = [
        [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225],
        [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225],
    ]
    torch.testing.assert_close(scaled[:, :, 0, 1], torch.tensor(expected))
    torch.testing.assert_close(IMAGENET(images.double() / 255), scaled)


def test_the_normalization_of_a_split_gives_mean_0_and_sd_1():
    images = torch.randint(256, (700, 2, 4, 4), dtype=torch.uint8, generator=generator())
    images[:, 1] //= 4
    split = TensorSplit(images, torch.zeros(700, dtype=torch.int64))
    scaled = normalization_of(split)(images)
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    # Floating images keep their units.
    plain = TensorSplit(images.float() * 3, split.labels)
    assert normalization_of(plain).mean[0] == pytest.approx(images[:, 0].float().mean().item() * 3, rel=1e-5)


def test_a_sample_is_enough_and_is_the_seeds():
    asked = []

    class Counted(TensorSplit):
        def batches(self, indices):
            for batch in indices:
                asked.extend(batch.tolist())
                yield from super().batches([batch])

    images = torch.randint(256, (500, 1, 2, 2), dtype=torch.uint8, generator=generator())
    split = Counted(images, torch.zeros(500, dtype=torch.int64))
    before = torch.random.get_rng_state()
    first = normalization_of(split, images=50, seed=1)
    assert len(set(asked)) == 50
    assert first == normalization_of(split, images=50, seed=1) != normalization_of(split, images=50, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_normalized_is_named():
    black = TensorSplit(torch.zeros(3, 2, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="channel 0 of the images is 0 everywhere"):
        normalization_of(black)
    with pytest.raises(ValueError, match="the images have 1 channels, expected 3"):
        IMAGENET(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="one number for each channel, got 1 and 2"):
        Normalization((0.5,), (0.5, 0.5))
    for std in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="std must be greater than 0"):
            Normalization((0.5,), (std,))
