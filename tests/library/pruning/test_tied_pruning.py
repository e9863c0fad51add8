import json

import pytest
import torch
from compaction_cases import assert_compacts, prune_structures
from residual_cases import RandomResidual, SmallResNet, Sum
from torch import nn

import bmrs
from bmrs.graph.masked_graph import graph_for_pruning
from bmrs.models.resnet import Bottleneck
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
STAGE1 = ["bn1.noise", "layer1.0.bn2.noise", "layer1.1.bn2.noise"]
STAGE2 = ["layer2.0.bn2.noise", "layer2.0.downsample.1.noise", "layer2.1.bn2.noise"]


@pytest.fixture
def resnet() -> SmallResNet:
    torch.manual_seed(0)
    return bmrs.add_noise(SmallResNet(), where=nn.BatchNorm2d)


def spread(model: nn.Module, seed: int) -> nn.Module:
    """Posteriors of which some are to be kept and some to be pruned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in noise_layers(model).values():
            layer.mu.uniform_(-20.0, 0.0, generator=generator)
            layer.log_sigma.uniform_(-3.0, 3.0, generator=generator)
    return model


class TestTies:
    def test_identity_shortcuts_tie_a_whole_stage(self, resnet):
        names = list(noise_layers(resnet))
        groups = graph_for_pruning(resnet.train(), IMAGES).tied
        assert sorted(map(sorted, groups)) == [sorted(STAGE1), sorted(STAGE2)]
        assert resnet.training
        assert int(resnet.bn1.num_batches_tracked) == 0
        assert all(name in names for group in groups for name in group)

    def test_each_stage_of_bottlenecks_is_one_group(self):
        stages = [Bottleneck(3, 2, 1), Bottleneck(8, 2, 1), Bottleneck(8, 3, 2), Bottleneck(12, 3, 1)]
        model = nn.Sequential(*stages, nn.Conv2d(12, 2, 1))
        bmrs.add_noise(model, where=nn.BatchNorm2d)
        groups = graph_for_pruning(model, IMAGES).tied
        assert [set(group) for group in groups] == [
            {"0.bn3.noise", "0.downsample.1.noise", "1.bn3.noise"},
            {"2.bn3.noise", "2.downsample.1.noise", "3.bn3.noise"},
        ]

    @pytest.mark.parametrize("where", ["*.bn2", "layer*.bn1"])
    def test_a_branch_without_noise_ties_nothing(self, where):
        """The first stage's stem and the second stage's projection would keep every channel anyway."""
        model = bmrs.add_noise(SmallResNet(), where=where)
        assert graph_for_pruning(model, IMAGES).tied == []

    def test_only_the_last_noise_of_a_branch_is_tied(self):
        branches = [
            nn.Sequential(nn.Conv2d(3, 4, 1), NoiseLayer(4), nn.ReLU(), NoiseLayer(4), nn.BatchNorm2d(4)),
            nn.Sequential(
                nn.Conv2d(3, 4, 1), NoiseLayer(4), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Sigmoid()
            ),
        ]
        model = nn.Sequential(Sum(*branches, way="operator"), nn.ReLU(), nn.Conv2d(4, 2, 1))
        assert graph_for_pruning(model, IMAGES).tied == [["0.first.3", "0.second.1"]]

    def test_mixing_layers_between_noise_and_addition_untie(self):
        for mixing in (nn.Conv2d(4, 4, 1), nn.Softmax(1), nn.Conv2d(4, 4, 1, groups=2)):
            first = nn.Sequential(nn.Conv2d(3, 4, 1), NoiseLayer(4), mixing)
            second = nn.Sequential(nn.Conv2d(3, 4, 1), NoiseLayer(4))
            assert graph_for_pruning(Sum(first, second, way="operator"), IMAGES).tied == []

    def test_noise_on_a_sum_stands_for_it(self):
        def branch() -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 3, 1), NoiseLayer(3))

        model = nn.Sequential(
            Sum(branch(), branch(), way="operator"),
            NoiseLayer(3),
            Sum(branch(), nn.Identity(), way="operator"),
        )
        # As an output it stays whatever is pruned.
        assert graph_for_pruning(model, IMAGES).tied == []
        model.append(nn.Conv2d(3, 2, 1))
        assert graph_for_pruning(model, IMAGES).tied == [["1", "2.first.1"]]
        for name in ("1", "2.first.1"):
            prune_structures(noise_layers(model)[name], [2])
        assert assert_compacts(model, IMAGES)[-1].in_channels == 2

    def test_factors_of_a_product_are_not_tied(self):
        """One of them makes it zero."""

        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate, self.value, self.out = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.out(torch.sigmoid(self.gate(x)) * self.value(x))

        model = bmrs.add_noise(Gated(), where=lambda name, _: name in ("gate", "value"))
        assert graph_for_pruning(model, EXAMPLE).tied == []
        prune_structures(model.value.noise, [1])
        assert assert_compacts(model, EXAMPLE).gate.out_features == 3

    def test_structures_of_other_sizes_are_not_tied(self):
        model = nn.Sequential(
            Sum(
                nn.Sequential(nn.Linear(2, 4), NoiseLayer(4)),
                nn.Sequential(nn.Linear(2, 4), NoiseLayer(2, structure_size=2)),
                way="operator",
            ),
            nn.Linear(4, 1),
        )
        first, second = noise_layers(model).values()
        assert graph_for_pruning(model, EXAMPLE).tied == []
        with torch.no_grad():
            first.mu[0] = second.mu[0] = -19.0
            first.log_sigma[0] = second.log_sigma[0] = 3.0
        bmrs.prune(model, bmrs.BMRSNormal(tolerance=0.9), example_inputs=EXAMPLE)
        assert first.mask.tolist() == [False, True, True, True]
        assert second.mask.tolist() == [False, True]
        assert assert_compacts(model, EXAMPLE)[1].in_features == 3

    def test_concatenated_channels_are_not_tied(self):
        class Both(Sum):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.cat([self.first(x), self.second(x)], dim=1)

        branches = [nn.Sequential(nn.Linear(2, 4), NoiseLayer(4)) for _ in range(2)]
        model = nn.Sequential(Both(*branches, way="operator"), nn.Linear(8, 1))
        assert graph_for_pruning(model, EXAMPLE).tied == []

    def test_examples_in_a_mapping(self):
        class Added(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.out = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 1)

            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return self.out(self.first(x) + self.second(y))

        model = bmrs.add_noise(Added(), where=lambda name, _: name in ("first", "second"))
        assert graph_for_pruning(model, {"y": EXAMPLE, "x": EXAMPLE}).tied == [
            ["first.noise", "second.noise"]
        ]

    def test_no_additions(self):
        assert graph_for_pruning(bmrs.models.LeNet5(), torch.randn(1, 1, 32, 32)).tied == []


def two_branches(structures: int) -> tuple[nn.Module, NoiseLayer, NoiseLayer]:
    first, second = NoiseLayer(structures), NoiseLayer(structures)
    branches = [nn.Sequential(nn.Linear(2, structures), noise) for noise in (first, second)]
    return nn.Sequential(Sum(*branches, way="operator"), nn.Linear(structures, 1)), first, second


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


EXAMPLE = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
CRITERIA = [bmrs.BMRSNormal(), bmrs.BMRSNormal(tolerance=0.919), bmrs.BMRSUniform(p1=4)]


class TestPrune:
    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
    def test_evidence_of_tied_structures_adds_up(self, criterion, seed):
        model, first, second = two_branches(200)
        spread(model, seed)
        alone = [criterion(layer) for layer in (first, second)]
        allowed = sum(decision.scores + criterion.tolerance for decision in alone)
        report = bmrs.prune(model, criterion, example_inputs=EXAMPLE)
        assert torch.equal(first.mask, allowed < 0)
        assert torch.equal(second.mask, first.mask)
        # Neither one's own decision nor both of them together.
        assert (~first.mask & ~alone[0].prune).any()
        assert (first.mask & alone[0].prune).any()
        # What both branches would give up goes in any case.
        assert not (first.mask & alone[0].prune & alone[1].prune).any()
        total = (alone[0].scores + alone[1].scores).sort().values
        for layer in report.layers:
            assert layer.lowest_score == pytest.approx(float(total[0]))
            assert layer.highest_score == pytest.approx(float(total[-1]))

    def test_log_odds_of_tied_structures_add_up(self):
        model, first, second = two_branches(200)
        spread(model, 0)
        alone = [bmrs.BMRSOdds()(layer) for layer in (first, second)]
        bmrs.prune(model, bmrs.BMRSOdds(), example_inputs=EXAMPLE)
        assert torch.equal(first.mask, alone[0].scores + alone[1].scores > 0)
        assert torch.equal(second.mask, first.mask)
        assert (~first.mask & ~(alone[0].prune & alone[1].prune)).any()

    @pytest.mark.parametrize("criterion", [bmrs.SNR(), bmrs.Mean(), bmrs.L2(ratio=0.5)], ids=repr)
    def test_other_criteria_must_agree(self, criterion):
        model, first, second = two_branches(200)
        spread(model, 0)
        bmrs.prune(model, criterion)
        agreed = first.mask | second.mask
        assert not torch.equal(first.mask, second.mask)
        assert not agreed.all()
        for layer in (first, second):
            layer.set_kept(torch.ones_like(layer.mask))
        bmrs.prune(model, criterion, example_inputs=[EXAMPLE])
        assert torch.equal(first.mask, agreed)
        assert torch.equal(second.mask, agreed)

    def test_structures_pruned_before_do_not_count(self):
        model, first, second = two_branches(3)
        with torch.no_grad():
            # Needed much, needless, needless.
            first.mu.copy_(torch.tensor([-0.5, -19.0, -19.0]))
            first.log_sigma.copy_(torch.tensor([-3.0, 1.0, 1.0]))
            second.mu.copy_(torch.tensor([-19.0, -0.5, -0.5]))
            second.log_sigma.copy_(torch.tensor([1.0, -3.0, -3.0]))
        first.mask[0] = False
        second.mask[1] = False
        bmrs.prune(model, bmrs.BMRSNormal(), example_inputs=EXAMPLE)
        assert first.mask.tolist() == [False, False, True]
        assert second.mask.tolist() == [False, False, True]

    @pytest.mark.parametrize("criterion", [bmrs.BMRSNormal(), bmrs.SNR(threshold=1e9)], ids=repr)
    def test_best_channel_of_tied_layers_is_the_same_one(self, criterion):
        model, first, second = two_branches(50)
        spread(model, 0)
        with torch.no_grad():
            for layer in (first, second):
                layer.mu.sub_(19.0).clamp_(-20.0, -18.0)
                layer.log_sigma.clamp_(0.5, 1.5)
        report = bmrs.prune(model, criterion, example_inputs=EXAMPLE)
        assert torch.equal(first.mask, second.mask)
        assert first.mask.sum() == 1
        assert all(layer.best_kept for layer in report.layers)

    def test_without_an_example_every_layer_decides_by_itself(self, resnet):
        spread(resnet, 0)
        report = bmrs.prune(resnet, bmrs.BMRSNormal())
        assert report.tied == ()
        masks = [layer.mask for name, layer in noise_layers(resnet).items() if name in STAGE1]
        assert not torch.equal(masks[0], masks[1])

    def test_report_names_what_was_judged_together(self, resnet):
        report = bmrs.prune(spread(resnet, 0), bmrs.BMRSNormal(), example_inputs=IMAGES)
        assert sorted(map(sorted, report.tied)) == [sorted(STAGE1), sorted(STAGE2)]
        assert "judged together: bn1.noise, layer1.0.bn2.noise, layer1.1.bn2.noise" in str(report)
        assert json.loads(json.dumps(report.to_dict()))["tied"] == [list(group) for group in report.tied]

    @pytest.mark.parametrize("seed", range(3))
    def test_channels_pruned_together_leave_the_compacted_network(self, resnet, seed):
        bmrs.prune(spread(resnet, seed), bmrs.BMRSNormal(tolerance=0.919), example_inputs=IMAGES)
        compacted = assert_compacts(resnet, IMAGES)
        norms = {n: m for n, m in compacted.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert len(norms) == len(noise_layers(resnet))
        for name, layer in norms.items():
            assert layer.num_features == int(resnet.get_submodule(name).noise.mask.sum())
        report = bmrs.compact_report(compacted)
        assert report.removed == report.pruned > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(7))
    def test_random_networks(self, seed):
        torch.manual_seed(seed)
        case = RandomResidual(seed)
        model = spread(case.model, seed)
        x = torch.randn(case.example_shape)
        report = bmrs.prune(model, bmrs.BMRSUniform(p1=4), example_inputs=x)
        layers = noise_layers(model)
        for group in report.tied:
            assert len({tuple(layers[name].mask.tolist()) for name in group}) == 1
        assert_compacts(model, x)

    @pytest.mark.parametrize(
        ("model", "example", "error", "message"),
        [
            (
                nn.Sequential(Branching(), NoiseLayer(2)),
                EXAMPLE,
                ValueError,
                r"prune with .* failed on Sequential",
            ),
            (NoiseLayer(2), [EXAMPLE, EXAMPLE], ValueError, r"does not run on example_inputs"),
            (NoiseLayer(2), 3.0, TypeError, r"example_inputs must be a tensor, a sequence"),
            (
                nn.Sequential(nn.Linear(3, 2), NoiseLayer(2)),
                EXAMPLE,
                ValueError,
                r"does not run on example_inputs",
            ),
        ],
    )
    def test_models_and_examples_that_compact_does_not_take(self, model, example, error, message):
        spread(model, 0)
        with pytest.raises(error, match=message):
            bmrs.prune(model, bmrs.BMRSNormal(), example_inputs=example)
        assert all(layer.mask.all() for layer in noise_layers(model).values())
