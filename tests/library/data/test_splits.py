import numpy as np
import pytest
import torch
from own_data_sets import Numbered

from bmrs.data import MappedSplit, StreamedSplit, TensorSplit

CPU = torch.device("cpu")
IMAGES = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 5).contiguous()
LABELS = torch.arange(6) % 3


def in_memory(folder):
    return TensorSplit(IMAGES, LABELS)


def mapped(folder):
    np.save(folder / "images.npy", np.concatenate([np.full((2, 3, 4, 5), 99, np.uint8), IMAGES.numpy()]))
    return MappedSplit(np.load(folder / "images.npy", mmap_mode="r"), torch.arange(2, 8), LABELS)


def streamed(folder):
    return StreamedSplit("numbers", Numbered(6), torch.arange(6), (3, 4, 5), torch.uint8, num_classes=3)


@pytest.fixture(params=[in_memory, mapped, streamed])
def split(request, tmp_path):
    return request.param(tmp_path)


def numbers(batches):
    return [(batch.images[:, 0, 0, 0].tolist(), batch.labels.tolist()) for batch in batches]


def test_batches_are_of_the_indices_that_are_asked_for(split):
    assert len(split) == 6
    assert split.image_shape == (3, 4, 5)
    assert split.device == CPU
    assert numbers(split.batches([torch.tensor([4, 0]), torch.tensor([5])])) == [([4, 0], [1, 0]), ([5], [2])]
    assert numbers(split.in_order(4)) == [([0, 1, 2, 3], [0, 1, 2, 0]), ([4, 5], [1, 2])]
    assert torch.equal(split.examples(2), IMAGES[:2])
    assert torch.equal(split.examples(9), IMAGES)


def test_a_part_is_of_its_indices_in_their_order(split):
    part = split.part(torch.tensor([5, 1, 2])).part(torch.tensor([1, 0]))
    assert len(part) == 2
    assert numbers(part.in_order(2)) == [([1, 5], [1, 2])]
    assert [each.tolist() for each in part.fingerprint()] != [each.tolist() for each in split.fingerprint()]


def test_images_are_prepared_batch_by_batch(split):
    prepared = split.prepared(lambda images: images.float()[:, :1] / 2, CPU)
    assert prepared.image_shape == (1, 4, 5)
    assert numbers(prepared.in_order(6)) == [([0, 0.5, 1, 1.5, 2, 2.5], LABELS.tolist())]
    # It replaces what was there, and leaves the split as it was.
    assert torch.equal(prepared.prepared(None, CPU).examples(6), IMAGES)
    assert torch.equal(split.examples(6), IMAGES)
    assert prepared.part(torch.tensor([3])).examples(1).unique().tolist() == [1.5]


def test_what_comes_out_may_be_written_to(split):
    for batch in split.in_order(3):
        batch.images.add_(1)
    assert torch.equal(split.examples(6), IMAGES)
