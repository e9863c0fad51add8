import math

import pytest
import torch

from bmrs import expected_calibration_error, negative_log_likelihood

# Two classes; confidences 0.6, 0.65, 0.9, 1, of which the second and the fourth are right.
PROBABILITIES = torch.tensor([[0.6, 0.4], [0.35, 0.65], [0.9, 0.1], [0.0, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([1, 1, 1, 1])


def test_likelihood():
    expected = -sum(math.log(p) for p in (0.4, 0.65, 0.1, 1.0)) / 4
    found = negative_log_likelihood(PROBABILITIES, LABELS, probabilities=True)
    assert found == pytest.approx(expected, rel=1e-12)
    logits = torch.tensor([[2.0, -1.0, 0.5], [1e4, -1e4, 0.0]])
    expected = (math.log(math.exp(3) + 1 + math.exp(1.5)) + 2e4) / 2
    assert negative_log_likelihood(logits, torch.tensor([1, 1])) == pytest.approx(expected, rel=1e-6)
    assert negative_log_likelihood(PROBABILITIES, 1 - LABELS, probabilities=True) == math.inf


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # (0.6, 0.7] has 0.65, (0.5, 0.6] has its upper end, (0.8, 0.9] has 0.9 and (0.9, 1] has 1.
        ({"bins": 10}, (0.6 + 0.35 + 0.9 + 0.0) / 4),
        ({"bins": 2}, abs(0.6 - 0.35 + 0.9 + 0.0) / 4),
        ({"bins": 1}, abs(0.6 - 0.35 + 0.9 + 0.0) / 4),
        ({"bins": 2, "adaptive": True}, (abs(0.6 - 0.35) + 0.9) / 4),
        ({}, (0.6 + 0.35 + 0.9 + 0.0) / 4),
    ],
)
def test_calibration_error(options, expected):
    for outputs, kind in ((PROBABILITIES, True), (PROBABILITIES.clamp_min(1e-300).log(), False)):
        found = expected_calibration_error(outputs, LABELS, probabilities=kind, **options)
        assert found == pytest.approx(expected, abs=1e-12)


def test_answers_that_are_as_often_right_as_they_are_sure_are_calibrated():
    outputs = torch.tensor([[0.75, 0.25]]).repeat(4, 1)
    assert expected_calibration_error(outputs, torch.tensor([0, 0, 1, 0]), probabilities=True) == 0


@pytest.mark.parametrize(
    ("outputs", "labels", "options", "message"),
    [
        (torch.zeros(2), torch.zeros(2).long(), {}, r"outputs must be floating, of shape \(N, classes\)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), {}, "and not empty"),
        (torch.zeros(2, 2).long(), torch.zeros(2).long(), {}, "outputs must be floating"),
        (torch.zeros(2, 2), torch.zeros(2), {}, r"labels must be int64 of shape \(2,\)"),
        (torch.zeros(2, 2), torch.zeros(3).long(), {}, r"got torch\.int64 of shape \(3,\)"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), {}, r"labels must lie in \[0, 2\), got 0 to 2"),
        (torch.full((2, 2), math.nan), torch.tensor([0, 1]), {}, "outputs must be finite"),
        (torch.ones(2, 2), torch.tensor([0, 1]), {"probabilities": True}, "outputs must be probabilities"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), {"bins": 0}, "bins must be at least 1"),
        ([0.0], torch.tensor([0]), {}, "outputs must be a tensor, got list"),
    ],
)
def test_unsuitable_arguments(outputs, labels, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        expected_calibration_error(outputs, labels, **options)
