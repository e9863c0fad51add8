import pytest
import torch
from torch import nn

import bmrs
from bmrs.compaction.costs import flops, num_parameters
from bmrs.data import TensorSplit
from bmrs.training.evaluation import accuracy, compression, latency, quality


def test_accuracy_is_the_share_of_right_answers():
    # The "image" holds its logits.
    logits = torch.eye(4)[torch.arange(1200) % 4]
    labels = torch.where(torch.arange(1200) < 900, torch.arange(1200) % 4, (torch.arange(1200) + 1) % 4)
    assert accuracy(nn.Flatten(), TensorSplit(logits[:, :, None, None], labels)) == 0.75


def test_quality_is_that_of_all_batches_together():
    logits, labels = torch.randn(1200, 4), torch.arange(1200) % 4
    found = quality(nn.Flatten(), TensorSplit(logits[:, :, None, None], labels))
    assert found.accuracy == accuracy(nn.Flatten(), TensorSplit(logits[:, :, None, None], labels))
    assert found.nll == pytest.approx(bmrs.negative_log_likelihood(logits, labels), rel=1e-12)
    assert found.ece == pytest.approx(bmrs.expected_calibration_error(logits, labels), rel=1e-12)
    logits[700, 2] = torch.nan
    with pytest.raises(ValueError, match="outputs must be finite"):
        quality(nn.Flatten(), TensorSplit(logits[:, :, None, None], labels))


def test_batches_are_evaluated_without_noise_and_joined():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(2, 3)).train()
    images = torch.randn(1100, 2, 1, 1)
    right = TensorSplit(images, model[2](images.flatten(1)).argmax(dim=1))
    assert accuracy(model, right) == 1


def test_compression_counts_what_compaction_removes():
    model = bmrs.models.MLP(in_features=6, num_blocks=0, hidden=5, num_classes=2)
    assert compression(model, torch.ones(1, 6)) == 0
    model.hidden0_tanh.mask[:3] = False
    # 5·6 + 5 and 2·5 + 2 weights and biases, 2·5 of the noise; 2·6 + 2, 2·2 + 2 and 2·2 remain.
    assert num_parameters(model) == 57
    assert compression(model, torch.ones(1, 6)) == pytest.approx(100 * (1 - 24 / 57))


def test_flops_are_two_for_each_multiply_add():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    assert flops(model, torch.ones(1, 1, 4, 4)) == 2 * (2 * 2 * 2 * 9 + 8 * 5)


def test_latency_orders_a_small_and_a_large_network():
    small, large = nn.Linear(400, 2), nn.Sequential(*(nn.Linear(400, 400) for _ in range(10)))
    small_time, large_time = latency([small, large], torch.ones(16, 400), rounds=3, min_seconds=1e-3)
    assert 0 < small_time < large_time < 1
