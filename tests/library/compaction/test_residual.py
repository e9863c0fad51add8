import copy

import pytest
import torch
from compaction_cases import assert_compacts, parameter_shapes, prune_structures, randomise
from residual_cases import BasicBlock, RandomResidual, SmallResNet, Sum
from torch import nn

import bmrs
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_random_residual_networks(seed):
    dtype = [torch.float32, torch.float64][seed % 2]
    torch.manual_seed(seed)
    case = RandomResidual(seed)
    model = randomise(case.model, seed, pruned=[0.0, 0.3, 0.6, 1.0][seed // 2 % 4]).to(dtype).train()
    for layer in list(noise_layers(model).values())[:: seed % 5 + 2]:
        layer.mask.fill_(False)
    assert_compacts(model, torch.randn(case.example_shape, dtype=dtype))


@pytest.fixture
def resnet() -> SmallResNet:
    """Noise behind every batch norm, nothing pruned."""
    torch.manual_seed(0)
    return randomise(bmrs.add_noise(SmallResNet(), where=nn.BatchNorm2d), pruned=0.0)


def stage1(model: SmallResNet) -> list[NoiseLayer]:
    """The noise layers that share the channels of the first stage."""
    return [model.bn1.noise, model.layer1[0].bn2.noise, model.layer1[1].bn2.noise]


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class TestBlocks:
    def test_inside_a_block_channels_go(self, resnet):
        prune_structures(resnet.layer1[0].bn1.noise, [1, 4, 5])
        compacted = assert_compacts(resnet, IMAGES)
        assert compacted.layer1[0].conv1.weight.shape == (3, 6, 3, 3)
        assert compacted.layer1[0].bn1.num_features == 3
        assert compacted.layer1[0].conv2.weight.shape == (6, 3, 3, 3)

    def test_channel_pruned_in_all_tied_branches_goes_from_the_whole_stage(self, resnet):
        for noise in stage1(resnet):
            prune_structures(noise, [0, 2])
        shapes = parameter_shapes(assert_compacts(resnet, IMAGES))
        assert shapes["conv1.weight"] == (4, 3, 3, 3)
        assert shapes["layer1.0.conv1.weight"] == shapes["layer1.1.conv1.weight"] == (6, 4, 3, 3)
        assert shapes["layer1.0.conv2.weight"] == shapes["layer1.1.conv2.weight"] == (4, 6, 3, 3)
        assert shapes["layer1.1.bn2.bias"] == (4,)
        assert shapes["layer2.0.conv1.weight"] == (8, 4, 3, 3)
        assert shapes["layer2.0.downsample.0.weight"] == (8, 4, 1, 1)

    @pytest.mark.parametrize("kept_by", range(3))
    def test_channel_that_one_tied_branch_keeps_stays_with_zero_weights_in_the_others(self, resnet, kept_by):
        branches = ["bn1", "layer1.0.bn2", "layer1.1.bn2"]
        for branch, noise in enumerate(stage1(resnet)):
            if branch != kept_by:
                prune_structures(noise, [3])
        compacted = assert_compacts(resnet, IMAGES)
        norms = [compacted.get_submodule(name) for name in branches]
        assert all(norm.num_features == 6 for norm in norms)
        assert [bool(norm.weight[3] != 0) for norm in norms] == [branch == kept_by for branch in range(3)]
        assert [bool(norm.bias[3] != 0) for norm in norms] == [branch == kept_by for branch in range(3)]

    def test_block_whose_inside_is_all_pruned_adds_a_constant(self, resnet):
        prune_structures(resnet.layer2[1].bn1.noise, list(range(8)))
        compacted = assert_compacts(resnet, IMAGES)
        left = {name for name, _ in compacted.layer2[1].named_parameters()}
        assert left == {"bn2.weight", "bn2.bias"}

    def test_stage_that_is_all_pruned_keeps_one_channel(self, resnet):
        for noise in stage1(resnet):
            prune_structures(noise, list(range(6)))
        compacted = assert_compacts(resnet, IMAGES)
        assert compacted.layer1[1].conv2.out_channels == compacted.layer2[0].conv1.in_channels == 1

    def test_branch_without_noise_keeps_every_channel(self):
        model = nn.Sequential(BasicBlock(3, 6), nn.Conv2d(6, 2, 1))
        bmrs.add_noise(model, where="0.bn2")
        randomise(model, pruned=0.0)
        prune_structures(model[0].bn2.noise, [0, 1])
        assert assert_compacts(model, IMAGES).get_submodule("1").in_channels == 6

    def test_output_of_an_addition_keeps_its_shape(self):
        model = bmrs.add_noise(BasicBlock(3, 6), where=nn.BatchNorm2d)
        for noise in noise_layers(randomise(model, pruned=0.0)).values():
            prune_structures(noise, [0])
        compacted = assert_compacts(model, IMAGES)
        assert compacted.conv1.out_channels == 5
        assert compacted.conv2.out_channels == compacted.downsample[0].out_channels == 6

    def test_constants_of_both_branches_move_into_the_next_bias(self):
        branches = [
            nn.Sequential(nn.Conv2d(3, 4, 1), NoiseLayer(4), nn.BatchNorm2d(4), activation)
            for activation in (nn.Sigmoid(), nn.Tanh())
        ]
        model = nn.Sequential(Sum(*branches, way="operator"), nn.GELU(), nn.Conv2d(4, 2, 3))
        randomise(model, pruned=0.0)
        prune_structures(branches[0][1], [0, 1])
        prune_structures(branches[1][1], [1, 2])
        compacted = assert_compacts(model, IMAGES)
        assert compacted.get_submodule("2").in_channels == 3
        model[2].padding = (1, 1)
        assert assert_compacts(model, IMAGES).get_submodule("2").in_channels == 4

    def test_channels_that_an_addition_ties_to_a_grouped_convolution(self):
        """The convolution can only lose equally many channels in each group, and so can what is tied to it."""
        branches = [
            nn.Sequential(nn.Conv2d(3, 4, 1), NoiseLayer(4)),
            nn.Sequential(nn.Conv2d(3, 4, 1), NoiseLayer(4)),
        ]
        model = nn.Sequential(Sum(*branches, way="operator"), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2))
        randomise(model, pruned=0.0)
        for branch in branches:
            prune_structures(branch[1], [0, 1, 2])
        compacted = assert_compacts(model, IMAGES)
        assert compacted[0].first[0].out_channels == 2
        assert compacted.get_submodule("2").weight.shape == (4, 1, 1, 1)

    def test_residual_linear_layers(self):
        inner = nn.Sequential(
            nn.Linear(4, 6), NoiseLayer(6, activation="tanh"), nn.Linear(6, 4), NoiseLayer(4)
        )
        model = nn.Sequential(
            nn.Linear(3, 4), NoiseLayer(4), Sum(inner, nn.Identity(), way="in place"), nn.Linear(4, 2)
        )
        randomise(model, pruned=0.0)
        prune_structures(inner[1], [5])
        prune_structures(inner[3], [0, 1])
        prune_structures(model[1], [1, 2])
        shapes = parameter_shapes(assert_compacts(model, torch.randn(5, 3)))
        assert shapes["2.first.0.weight"] == (5, 3)
        assert shapes["3.weight"] == (2, 3)

    def test_softmax_keeps_every_channel_before_it_whatever_follows(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), NoiseLayer(4), nn.Linear(4, 2))
        randomise(model, pruned=0.0)
        prune_structures(model[2], [2])
        assert assert_compacts(model, torch.randn(5, 3))[0].out_features == 4


class TestFolding:
    def test_noise_moves_forward_into_all_that_read_it(self):
        branches = [
            nn.Conv2d(6, 4, 3, padding=1),
            nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
        ]
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), NoiseLayer(6), Sum(*branches, way="operator"))
        randomise(model, pruned=0.0)
        prune_structures(model[2], [0])
        compacted = assert_compacts(model, IMAGES)
        assert torch.equal(compacted.get_submodule("0").weight, model[0].weight[1:])

    def test_noise_on_a_sum_moves_backward_into_both_operands(self):
        branches = [nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()), nn.Conv2d(3, 6, 1)]
        model = nn.Sequential(Sum(*branches, way="method"), NoiseLayer(6), nn.Tanh(), nn.Conv2d(6, 2, 1))
        randomise(model, pruned=0.0)
        prune_structures(model[1], [0])
        compacted = assert_compacts(model, IMAGES)
        assert compacted[0].first[0].out_channels == 5
        assert compacted[0].second.out_channels == 5

    def test_tensor_added_to_itself(self):
        class Doubled(nn.Module):
            def forward(self, x):
                return x + x

        model = nn.Sequential(nn.Linear(3, 4), NoiseLayer(4), Doubled(), nn.Tanh(), nn.Linear(4, 2))
        randomise(model, pruned=0.0)
        prune_structures(model[1], [3])
        assert assert_compacts(model, torch.randn(5, 3)).get_submodule("4").in_features == 3

    def test_what_the_output_does_not_need_stays_as_it_is(self):
        class Unused(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.noise, self.last = nn.Linear(3, 4), NoiseLayer(4), nn.Linear(4, 2)
                self.called, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                x = self.noise(self.used(x))
                self.called(x)
                return self.last(x)

        model = randomise(Unused(), pruned=0.0)
        prune_structures(model.noise, [1])
        compacted = assert_compacts(model, torch.randn(2, 3))
        assert compacted.last.in_features == 3
        assert compacted.called.out_features == compacted.never.out_features == 4
        assert torch.equal(compacted.never.weight, model.never.weight)


class OverwritesItsShortcut(nn.Module):
    """An activation in place before the addition changes both operands."""

    def __init__(self, call):
        super().__init__()
        self.first, self.noise, self.second = nn.Linear(3, 4), NoiseLayer(4), nn.Linear(4, 4)
        self.relu, self.call = nn.ReLU(inplace=True), call

    def forward(self, x):
        x = self.first(x)
        y = self.noise(self.call(self, x))
        return x + self.second(y)


class NoiseBeforeInPlace(nn.Module):
    """Noise makes a new tensor, which may be overwritten; without it there would be none."""

    def __init__(self):
        super().__init__()
        self.first, self.noise, self.second = nn.Conv1d(3, 4, 1), NoiseLayer(4), nn.Linear(20, 20)
        self.relu, self.third = nn.ReLU(inplace=True), nn.Linear(20, 20)

    def forward(self, x):
        x = self.first(x)
        y = self.second(self.relu(torch.flatten(self.noise(x), 1)))
        return y + self.third(torch.flatten(x, 1))


class AddsInPlace(nn.Module):
    """An addition in place changes what another branch reads, through a dropout that hands its input on."""

    def __init__(self):
        super().__init__()
        self.first, self.noise, self.dropout = nn.Linear(3, 4), NoiseLayer(4), nn.Dropout()
        self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        y = self.dropout(x)
        x += self.noise(self.second(x))
        return self.third(torch.relu_(y) + x)


class TestInPlace:
    def test_later_readers_see_what_was_added(self):
        model = randomise(AddsInPlace(), pruned=0.0)
        prune_structures(model.noise, [1])
        assert_compacts(model, torch.randn(5, 3))

    def test_input_is_not_overwritten_where_the_model_did_not(self):
        """Noise in front of an activation in place makes a tensor of its own."""
        model = nn.Sequential(NoiseLayer(3), nn.ReLU(inplace=True), nn.Linear(3, 2), nn.ReLU(inplace=True))
        compacted = assert_compacts(model, torch.randn(4, 3))
        x = torch.randn(4, 3)
        before = x.clone()
        compacted(x)
        assert torch.equal(x, before)

    @pytest.mark.parametrize(
        "call",
        [
            lambda self, x: self.relu(x),
            lambda self, x: torch.relu_(x),
            lambda self, x: x.relu_(),
            lambda self, x: nn.functional.relu(x, inplace=True),
            lambda self, x: nn.functional.relu(x, True),
        ],
        ids=["module", "function", "method", "option", "position"],
    )
    def test_later_readers_see_what_was_overwritten(self, call):
        model = randomise(OverwritesItsShortcut(call), pruned=0.0)
        prune_structures(model.noise, [1])
        assert_compacts(model, torch.randn(5, 3))

    def test_nothing_is_overwritten_that_the_model_itself_kept(self):
        model = randomise(NoiseBeforeInPlace(), pruned=0.0)
        prune_structures(model.noise, [1])
        assert_compacts(model, torch.randn(2, 3, 5))

    @pytest.mark.filterwarnings("ignore:the model .* has no noise layer")
    def test_example_stays_even_where_the_model_overwrites_its_input(self):
        model = nn.Sequential(Sum(nn.Sequential(nn.Linear(3, 3)), nn.ReLU(inplace=True), way="operator"))
        x = torch.randn(4, 3)
        before = x.clone()
        compacted = bmrs.compact(model, x)
        assert torch.equal(x, before)
        torch.testing.assert_close(compacted(before.clone()), model(before.clone()))

    def test_layers_go_on_working_in_place(self, resnet):
        compacted = assert_compacts(resnet, IMAGES)
        assert compacted.relu.inplace
        assert compacted.layer1[0].relu.inplace


class TestNetworks:
    def test_compacted_network_is_of_the_own_class(self, resnet):
        for noise in noise_layers(resnet).values():
            prune_structures(noise, [0])
        compacted = assert_compacts(resnet, IMAGES)
        assert type(compacted) is SmallResNet
        assert not compacted.training
        assert list(parameter_shapes(compacted)) == list(parameter_shapes(SmallResNet()))
        assert copy.deepcopy(compacted)(IMAGES).equal(compacted(IMAGES))

    def test_block_called_twice(self):
        block = Sum(nn.Sequential(nn.Linear(4, 4), NoiseLayer(4)), nn.Linear(4, 4), way="operator")
        model = nn.Sequential(block, nn.ReLU(), block, nn.Linear(4, 2))
        prune_structures(block.first[1], [1])
        compacted = assert_compacts(model, torch.randn(5, 4))
        assert compacted[0] is compacted[2]
        assert not compacted[0].first[0].weight[1].any()

    def test_compacting_again_changes_nothing(self, resnet):
        prune_structures(resnet.layer1[0].bn1.noise, [0])
        once = bmrs.compact(resnet, IMAGES)
        twice = bmrs.compact(once, IMAGES)
        assert parameter_shapes(twice) == parameter_shapes(once)
        torch.testing.assert_close(twice(IMAGES), once(IMAGES))

    def test_compacted_network_trains(self, resnet):
        compacted = bmrs.compact(resnet, IMAGES).train()
        assert compacted.bn1.training
        compacted(IMAGES).square().sum().backward()
        assert all(parameter.grad is not None for parameter in compacted.parameters())

    def test_compacted_network_compiles_whole(self, resnet):
        compacted = bmrs.compact(resnet, IMAGES)
        compiled = torch.compile(compacted, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(IMAGES), compacted(IMAGES))

    def test_bottlenecks_pruned_together_lose_channels_everywhere(self):
        torch.manual_seed(0)
        model = bmrs.add_noise(bmrs.models.resnet50(num_classes=10, stem="7x7"), where=nn.BatchNorm2d)
        randomise(model, pruned=0.0)
        for noise in noise_layers(model).values():
            noise.mask[::2] = False
        compacted = assert_compacts(model, torch.randn(1, 3, 32, 32))
        before = dict(model.named_modules())
        convolutions = {n: m for n, m in compacted.named_modules() if isinstance(m, nn.Conv2d)}
        assert len(convolutions) == 53
        for name, layer in convolutions.items():
            assert layer.out_channels == before[name].out_channels // 2
