import pytest
import torch
from torch import nn

from bmrs.training import NonFiniteError
from bmrs.training.finite import FiniteWatch


class BrokenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)
        self.break_gradient = False

    def forward(self, x):
        weight = BrokenGradient.apply(self.second.weight) if self.break_gradient else self.second.weight
        x = self.first(x)
        return self.second(x) if weight is self.second.weight else self.second(x) + 0 * weight.sum()


def take_steps(network, watch, count):
    for _ in range(count):
        network.zero_grad()
        loss = network(torch.ones(4, 2)).mean()
        loss.backward()
        watch.record(watch.probes(loss))


def test_finite_steps_pass_and_hooks_are_removed():
    network = Network()
    with FiniteWatch(network) as watch:
        take_steps(network, watch, 3)
        watch.check(1)
        watch.check_parameters(1)
    assert not network.first._forward_hooks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_first_bad_step_and_layer_are_named(value):
    network = Network()
    with FiniteWatch(network) as watch:
        take_steps(network, watch, 3)
        watch.check(7)
        take_steps(network, watch, 1)
        network.second.bias.data.fill_(value)
        take_steps(network, watch, 1)
        network.first.bias.data.fill_(value)  # a later step must not hide the first one
        take_steps(network, watch, 2)
        with pytest.raises(
            NonFiniteError, match=r"epoch 7, step 5: first seen in the output of layer 'second'"
        ):
            watch.check(7)


def test_large_finite_values_are_no_error():
    network = Network()
    network.second.weight.data.fill_(1e30)
    with FiniteWatch(network) as watch:
        take_steps(network, watch, 1)
        watch.check(1)


def test_a_bad_loss_alone_is_named():
    network = Network()
    with FiniteWatch(network) as watch:
        take_steps(network, watch, 1)
        watch.record(watch.probes(torch.tensor(torch.nan)))
        with pytest.raises(NonFiniteError, match="epoch 1, step 2: first seen in the loss"):
            watch.check(1)


def test_a_bad_gradient_is_named():
    network = Network()
    network.break_gradient = True
    with FiniteWatch(network) as watch:
        take_steps(network, watch, 1)
        with pytest.raises(NonFiniteError, match=r"step 1: first seen in the gradient of 'second\.weight'"):
            watch.check(1)


def test_a_bad_parameter_is_named():
    network = Network()
    with FiniteWatch(network) as watch:
        take_steps(network, watch, 2)
        watch.check(1)
        network.second.weight.data[0, 1] = torch.nan
        with pytest.raises(
            NonFiniteError, match=r"epoch 1, step 2: first seen in parameter 'second\.weight'"
        ):
            watch.check_parameters(1)


def test_a_parameter_without_gradient_is_no_error():
    network = Network()
    network.first.weight.requires_grad_(False)
    with FiniteWatch(network) as watch:
        take_steps(network, watch, 1)
        watch.check(1)
