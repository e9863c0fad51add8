import pytest
import torch
import torch.nn.functional as F
from compaction_cases import randomise
from residual_cases import Sum
from torch import nn

import bmrs
from bmrs.noise_layer import NoiseLayer


class Dynamic(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x, y=None):
        return torch.relu(x) if y is None else x + y


class WithTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.relu(x) * self.scale


class TwoOutputs(nn.Module):
    def forward(self, x):
        x = torch.relu(x)
        return x, x


def calling(function) -> nn.Module:
    class Calling(nn.Module):
        def forward(self, x):
            return function(x)

    return Calling()


class TestErrors:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (Dynamic(), r"compact follows the model with torch\.fx, which failed on Dynamic"),
            (WithTensor(), r"also uses the tensor '.*scale'"),
            (TwoOutputs(), r"models that return one tensor, and this one returns \(relu, relu\)"),
            (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r"does not support layer '1' \(LayerNorm\)"),
            (
                nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)),
                r"layer '0' \(BatchNorm1d\) without running statistics",
            ),
            (calling(torch.sin), r"compact does not support the call at 'sin'"),
            (calling(lambda x: F.dropout(x, 0.5)), r"does not support the call at 'dropout'"),
            (
                calling(lambda x: x.view(2, -1, 2)),
                r"no reshaping but flattening, and 'view' turns shape \(3, 4\)",
            ),
            (
                nn.Sequential(nn.Linear(4, 4), nn.Tanh(), NoiseLayer(4), nn.Tanh()),
                r"noise layer '2' \(NoiseLayer\) cannot be folded: it cannot move forward past '3' \(Tanh\)",
            ),
            (
                nn.Sequential(nn.Linear(4, 4), NoiseLayer(4, activation="tanh"), nn.ReLU()),
                r"noise layer '1' \(NoiseLayer\) cannot be folded: .* past the model's output",
            ),
            (
                nn.Sequential(NoiseLayer(4), nn.ReLU(), NoiseLayer(4, activation="tanh"), nn.Linear(4, 1)),
                r"noise layer '0' \(NoiseLayer\) cannot be folded: .* past '2' \(Tanh\), and no linear",
            ),
            (
                nn.Sequential(nn.Linear(4, 2), nn.MaxPool1d(2)),
                r"needs batched input of 3 dimensions at layer '1' \(MaxPool1d\), got shape \(3, 2\)",
            ),
        ],
    )
    def test_what_cannot_be_compacted_is_named(self, model, message):
        randomise(model)
        with pytest.raises(ValueError, match=message):
            bmrs.compact(model, torch.randn(3, 4))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda x: x * torch.relu(x), r"does not support the call at 'mul': "),
            (lambda x: torch.cat([x, torch.relu(x)]), r"does not support the call at 'cat': "),
            (lambda x: x + 1.0, r"does not support the call at 'add': "),
            (lambda x: torch.add(x, torch.relu(x), alpha=2), r"does not support the call at 'add': "),
            (lambda x: x + x.sum(1, keepdim=True), r"does not support the call at 'sum': "),
            (lambda x: x + torch.ones(4), r"also uses the tensor '.*tensor_constant"),
            (lambda x: x.chunk(2)[0], r"does not support the call at 'getitem': "),
            (
                lambda x: F.adaptive_avg_pool1d(x[None], 1),
                r"does not support the call at 'getitem': ",
            ),
        ],
    )
    def test_other_ways_for_branches_to_meet_are_named(self, call, message):
        with pytest.raises(ValueError, match=message):
            bmrs.compact(calling(call), torch.randn(3, 4))

    def test_addition_of_unequal_shapes(self):
        pooled = Sum(nn.AdaptiveAvgPool1d(1), nn.ReLU(), way="operator")
        message = r"additions of tensors of one shape, and '0\.add' adds \(3, 2, 1\) and \(3, 2, 5\)"
        with pytest.raises(ValueError, match=message):
            bmrs.compact(nn.Sequential(pooled), torch.randn(3, 2, 5))

    def test_addition_of_channels_to_something_else(self):
        model = Sum(nn.Conv1d(5, 5, 1), nn.Linear(5, 5), way="operator")
        message = r"cannot follow the channels through 'add' \(Addition\): they lie along dimensions 1 and 2"
        with pytest.raises(ValueError, match=message):
            bmrs.compact(model, torch.randn(3, 5, 5))

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                nn.Sequential(
                    nn.Linear(4, 4), nn.Tanh(), NoiseLayer(4), Sum(nn.Linear(4, 4), nn.Identity(), "operator")
                ),
                r"noise layer '2' \(NoiseLayer\) cannot be folded: it cannot move forward past '3\.add' "
                r"\(Addition\), and no linear, convolution or batch norm layer can take it up before",
            ),
            (
                nn.Sequential(
                    nn.Linear(4, 4),
                    Sum(nn.Sequential(NoiseLayer(4), nn.Sigmoid()), nn.Linear(4, 4), way="operator"),
                ),
                r"noise layer '1\.first\.0' \(NoiseLayer\) cannot be folded: it cannot move forward past "
                r"'1\.first\.1' \(Sigmoid\), and backward it would act on '1\.second' \(Linear\) too",
            ),
            (
                nn.Sequential(
                    *(
                        nn.Linear(4, 4),
                        nn.ReLU(),
                        Sum(nn.Linear(4, 4), nn.Identity(), way="operator"),
                        nn.ReLU(),
                    ),
                    *(NoiseLayer(4), Sum(nn.Linear(4, 4), nn.Identity(), way="operator"), nn.Linear(4, 4)),
                ),
                r"noise layer '4' .* past '5\.add' \(Addition\), and backward it would act on '2\.first' \(Linear\)",
            ),
            (
                Sum(nn.Linear(4, 4), NoiseLayer(4), way="operator"),
                r"noise layer 'second' .* past 'add' \(Addition\), and no linear",
            ),
        ],
    )
    def test_noise_that_branches_hold_fast_is_named(self, model, message):
        randomise(model)
        with pytest.raises(ValueError, match=message):
            bmrs.compact(model, torch.randn(3, 4))

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                nn.Sequential(nn.Conv1d(2, 4, 1), nn.Linear(5, 5)),
                r"layer '1' \(Linear\): it acts along dimension 2 .* \(3, 4, 5\), whose channels lie along 1",
            ),
            (nn.Sequential(nn.Conv1d(2, 4, 1), NoiseLayer(5, dim=2)), "layer '1' .* acts along dimension 2"),
            (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(2)), "layer '1' .* acts along dimension 1"),
            (nn.Sequential(NoiseLayer(3, dim=0), nn.Linear(5, 4)), "layer '0' .* acts along dimension 0"),
            (
                nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Flatten(), NoiseLayer(20)),
                "noise layer '3' .* scales features of one channel differently",
            ),
        ],
    )
    def test_channels_that_cannot_be_followed_are_named(self, model, message):
        randomise(model, pruned=0.0)
        with pytest.raises(ValueError, match=message):
            bmrs.compact(model, torch.randn(3, 2, 5))

    def test_noise_on_the_flattened_input_that_cannot_move_is_named(self):
        model = nn.Sequential(nn.ReLU(), nn.Flatten(), NoiseLayer(10), nn.Tanh(), nn.Linear(10, 2))
        message = r"noise layer '2' \(NoiseLayer\) cannot be folded: .* past '3' \(Tanh\), and no linear"
        with pytest.raises(ValueError, match=message):
            bmrs.compact(model, torch.randn(3, 2, 5))

    @pytest.mark.parametrize(
        ("example", "error", "message"),
        [
            (
                (torch.ones(1, 4), torch.ones(1, 4)),
                TypeError,
                r"must be one tensor, .* got \(Tensor, Tensor\)",
            ),
            ([3.0], TypeError, r"got \(float\)"),
            (
                torch.ones(2, 5),
                ValueError,
                r"does not run on example_inputs of shape \(2, 5\) and torch.float32: mat1",
            ),
            (torch.ones(0, 4), ValueError, r"must hold an example, was of shape \(0, 4\)"),
        ],
    )
    def test_example_inputs(self, example, error, message):
        with pytest.raises(error, match=message):
            bmrs.compact(nn.Linear(4, 4), example)

    def test_optional_second_input_is_left_out(self):
        assert isinstance(bmrs.compact(TwoInputs(), torch.randn(2, 3))[0], nn.ReLU)

    def test_different_outputs_are_noticed(self):
        class Shifted(NoiseLayer):
            def forward(self, x):
                return super().forward(x) + 1.0

        model = nn.Sequential(nn.Linear(4, 4), Shifted(4), nn.Linear(4, 2))
        with pytest.raises(
            RuntimeError, match="the compacted model's outputs differ from the masked model's by"
        ):
            bmrs.compact(model, torch.randn(3, 4))

    def test_non_finite_outputs_are_noticed(self):
        model = nn.Sequential(nn.Linear(4, 4))
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match=r"outputs differ .* by nan"):
            bmrs.compact(model, torch.randn(3, 4))
