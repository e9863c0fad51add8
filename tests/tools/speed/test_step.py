"""The timing of training steps: that each way trains what its row says, and is compared with the right one."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from tiny_networks import TINY
from torch import nn

import bmrs
from benchmarks import records
from benchmarks.__main__ import main
from benchmarks.rivals.plain_layer import PlainNoiseLayer
from benchmarks.speed import networks, step
from benchmarks.speed.networks import TimedNetwork, with_noise_inside
from benchmarks.speed.step import NO_NOISE, Way
from benchmarks.speed.stopwatch import Round, Stopwatch
from bmrs.noise.lookup import noise_layers

CPU = torch.device("cpu")
PROJECT, PLAIN = Way("project", "element"), Way("plain", "element")
AUTHORS = Way(step.AUTHORS_LAYERS, "element")
KEYS = {
    *("network", "stand_in", "batch", "input", "granularity", "way", "backend", "mode", "dtype"),
    *("milliseconds", "ratio", "paper_ratio", "peak_memory", "channels_last"),
}


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    monkeypatch.setattr(step, "ROUND_MS", 0.1)


@pytest.fixture
def tiny_networks(monkeypatch):
    found = {"mlp": TINY, "vit": replace(TINY, name="other", stand_in=True)}
    monkeypatch.setattr(step, "trained_networks", lambda device, **options: found)


class FixedStopwatch(Stopwatch):
    """Runs nothing, and finds that each way takes twice the time of the one before."""

    def compare(self, plans, *, rounds, evict):
        return {name: [Round([2.0**number], False)] * rounds for number, name in enumerate(plans)}


def measured(ways=(NO_NOISE, PROJECT, PLAIN), network=TINY, stopwatch=None, **options):
    failures = []
    rows = step.measure_network(
        network, ways, "eager", stopwatch or Stopwatch(CPU), rounds=1, failures=failures, **options
    )
    return rows, failures


def test_resnet50_has_noise_behind_every_batch_norm():
    with torch.device("meta"):
        model = networks.RESNET50.build("sample", "torch")
    layers = noise_layers(model)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(layers) == [f"{name}.noise" for name in norms]
    assert len(layers) == 53
    assert sum(layer.num_structures for layer in layers.values()) == 26_560
    assert {(layer.granularity, layer.backend) for layer in layers.values()} == {("sample", "torch")}
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032 + 2 * 26_560


def test_vit_has_noise_on_the_output_of_every_block():
    with torch.device("meta"):
        model = networks.VIT.build("element", "auto")
    layers = noise_layers(model)
    assert list(layers) == [f"blocks.{block}.linear2.noise" for block in range(12)]
    assert {(layer.num_structures, layer.dim) for layer in layers.values()} == {(768, -1)}
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656 + 2 * 12 * 768


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: networks.VisionTransformer(1, 7), (2, 3, 224, 224)),
        (lambda: networks.convolution_chain(7), (2, 3, 32, 32)),
    ],
    ids=["vit", "chain"],
)
def test_networks_give_logits_and_every_parameter_a_gradient(make, shape):
    model = make()
    logits = model(torch.randn(shape))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stand_ins_are_named_and_only_for_a_cpu():
    on_cpu, on_gpu = (step.trained_networks(torch.device(name)) for name in ("cpu", "cuda"))
    assert list(on_cpu) == list(on_gpu)
    assert not any(network.stand_in for network in on_gpu.values())
    assert {name for name in on_cpu if on_cpu[name].stand_in} == {"resnet50", "vit"}
    for name, network in on_cpu.items():
        assert network.stand_in == (network.name != on_gpu[name].name)
        assert network.stand_in == (network != on_gpu[name])
        assert str(network.batch) in network.name or not network.stand_in
    assert step.trained_networks(CPU, whole=True) == on_gpu


@pytest.mark.parametrize("way", [NO_NOISE, PROJECT, PLAIN, AUTHORS], ids=lambda way: way.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_changes_every_parameter(way, dtype):
    one = step.step_of(TINY, way, CPU, dtype=dtype)
    before = {name: values.detach().clone() for name, values in one.model.named_parameters()}
    one()
    after = dict(one.model.named_parameters())
    assert any(name.endswith("mu") for name in after) == (way != NO_NOISE)
    for name, values in before.items():
        assert not torch.equal(after[name], values), name


def test_each_way_has_the_noise_layers_of_its_name():
    def kinds(way):
        found = [type(module) for module in step.step_of(TINY, way, CPU).model]
        return found.count(bmrs.NoiseLayer), found.count(PlainNoiseLayer), found.count(nn.Tanh)

    assert [kinds(way) for way in (NO_NOISE, PROJECT, PLAIN)] == [(0, 0, 2), (2, 0, 0), (0, 2, 0)]
    model = step.step_of(TINY, Way("project, torch path", "batch", "torch"), CPU).model
    assert {(each.granularity, each.backend) for each in noise_layers(model).values()} == {("batch", "torch")}
    assert {
        module.uniforms
        for module in step.step_of(TINY, PLAIN, CPU).model
        if isinstance(module, PlainNoiseLayer)
    } == {"torch"}


def test_ways_differ_by_noise_and_kl_alone():
    without, *noisy = (step.step_of(TINY, way, CPU) for way in (NO_NOISE, PROJECT, PLAIN, AUTHORS))
    project = noisy[0]
    divergence = bmrs.kl_divergence(project.model, weight="mean").item()
    assert divergence > 1
    # θ starts within a percent of 1.
    expected = without().item()
    for each in noisy:
        assert each().item() - divergence == pytest.approx(expected, rel=0.02)
    assert not without().requires_grad


def test_authors_layers_draw_what_the_projects_draw():
    behind = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    build = networks.with_noise_behind(lambda: copy.deepcopy(behind), (nn.Conv2d, nn.Linear))
    inside = with_noise_inside(functools.partial(bmrs.models.MLP, in_features=16, num_blocks=1, hidden=6))
    for network in (replace(TINY, build=build), replace(TINY, build=inside)):
        ours, theirs = (step.step_of(network, way, CPU).model for way in (PROJECT, AUTHORS))
        assert not noise_layers(theirs)
        found = bmrs.compat.gather_pruning_layers(theirs)
        assert [layer.mu.numel() for layer in found] == [
            layer.num_structures for layer in noise_layers(ours).values()
        ]
        x = torch.randn(2, 1, 4, 4)
        torch.manual_seed(0)
        drawn = ours(x)
        torch.manual_seed(0)
        torch.testing.assert_close(theirs(x), drawn)


@pytest.mark.parametrize(("granularity", "draws"), [("element", 120), ("sample", 10), ("batch", 5)])
def test_plain_layer_with_torchs_uniforms_draws_anew_at_the_granularity(granularity, draws):
    noise = bmrs.NoiseLayer(5, granularity=granularity, initial_mu=-2.0, initial_log_sigma=0.0)
    layer = PlainNoiseLayer(noise, uniforms="torch")
    torch.manual_seed(0)
    first, second = (layer(torch.ones(2, 5, 3, 4)) for _ in range(2))
    assert len(first.unique()) == draws
    assert not torch.equal(first, second)
    assert layer(torch.ones(2, 5, 3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_torch_path_competes_where_another_implementation_serves(monkeypatch):
    monkeypatch.setattr(step, "resolve_backend", lambda backend, tensor: "torch")
    assert step.ways_of(["element"], "eager", CPU) == [NO_NOISE, PROJECT, AUTHORS, PLAIN]
    monkeypatch.setattr(step, "resolve_backend", lambda backend, tensor: "fast")
    torch_path = Way("project, torch path", "element", "torch")
    assert step.ways_of(["element"], "eager", CPU) == [NO_NOISE, PROJECT, torch_path, AUTHORS, PLAIN]
    assert AUTHORS not in step.ways_of(["sample", "batch"], "eager", CPU)
    assert step.ways_of(["element", "batch"], "compiled", CPU) == [NO_NOISE, PROJECT, PLAIN]
    # Its operations depend on values, which a graph cannot.
    assert step.ways_of(["element"], "cuda graph", CPU) == [NO_NOISE, PROJECT, PLAIN]


def test_recomputed_noise_competes_where_the_network_allows_it():
    recomputed = Way(step.RECOMPUTED, "batch")
    ways = step.ways_of(["batch"], "eager", CPU, recomputes=True)
    assert ways[1:3] == [Way("project", "batch"), recomputed]
    assert recomputed not in step.ways_of(["batch"], "compiled", CPU, recomputes=True)
    assert all(bmrs.noise.recomputation.can_recompute(layer) for layer in hosts(networks.RESNET50))
    assert [name for name, network in step.trained_networks(CPU).items() if network.recomputes] == [
        "resnet50"
    ]


def hosts(network):
    with torch.device("meta"):
        model = network.build("batch", "torch")
    return [model.get_submodule(name.rpartition(".")[0]) for name in noise_layers(model)]


def test_memory_counts_what_noise_keeps():
    """Of a network of which nearly all memory is that of feature maps, which noise doubles behind a batch norm."""
    maps = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(inplace=True)) for _ in range(20)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1, networks.NUM_CLASSES),
    )
    build = networks.with_noise_behind(lambda: copy.deepcopy(maps), nn.BatchNorm2d)
    network = replace(TINY, build=build, input_shape=(1, 64, 64), batch=4, recomputes=True)
    project, recomputed = Way("project", "batch"), Way(step.RECOMPUTED, "batch")
    rows, failures = measured((NO_NOISE, project, recomputed), network)
    assert failures == []
    without, kept, again = (row["peak_memory"] for row in rows)
    assert without == 1.0
    assert 1.4 < kept < 1.55
    assert 1.0 <= again < 1.1


@pytest.mark.parametrize(
    ("options", "modes"),
    [
        (["--device", "cpu"], ["eager"]),
        (["--device", "cuda"], ["eager", "compiled", "cuda graph"]),
        (["--device", "cpu", "--modes", "compiled", "eager"], ["compiled", "eager"]),
        (["--device", "cuda", "--modes", "cuda-graph"], ["cuda graph"]),
    ],
    ids=" ".join,
)
def test_modes(options, modes):
    assert list(step.parsed(options).modes) == modes


def test_a_cuda_graph_needs_a_gpu(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["step", "--device", "cpu", "--modes", "cuda-graph"])
    assert "--modes cuda-graph needs --device cuda" in capsys.readouterr().err


def test_weights_and_examples_have_the_layout_of_the_network():
    build = with_noise_inside(functools.partial(bmrs.models.LeNet5, in_channels=3))
    plain, last = (
        TimedNetwork("LeNet-5", 2, (3, 32, 32), build, channels_last=channels_last)
        for channels_last in (False, True)
    )
    for network, layout in ((plain, torch.contiguous_format), (last, torch.channels_last)):
        one = step.step_of(network, NO_NOISE, CPU)
        weight = next(iter(one.model.parameters()))
        other = torch.contiguous_format if network.channels_last else torch.channels_last
        for tensor in (one.batch[0], weight):
            assert tensor.is_contiguous(memory_format=layout)
            assert not tensor.is_contiguous(memory_format=other)
    assert networks.RESNET50.channels_last


def test_only_the_compiled_mode_compiles(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    failures = []
    for mode in ("eager", "compiled"):
        step.measure_network(TINY, [NO_NOISE, PROJECT], mode, Stopwatch(CPU), rounds=1, failures=failures)
        assert len(compiled) == (2 if mode == "compiled" else 0)
    assert failures == []


def test_ratio_is_to_the_same_network_without_noise():
    rows, failures = measured(stopwatch=FixedStopwatch(CPU), dtype="bfloat16")
    assert failures == []
    assert [row["way"] for row in rows] == ["no noise", "project", "plain"]
    assert [row["ratio"]["value"] for row in rows] == [1.0, 2.0, 4.0]
    assert [row["milliseconds"]["median"] for row in rows] == [1.0, 2.0, 4.0]
    assert all(row.keys() == KEYS for row in rows)
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert [row["granularity"] for row in rows] == [None, "element", "element"]
    assert [row["backend"] is None for row in rows] == [True, False, True]


def test_a_way_that_fails_is_left_out_and_reported():
    rows, failures = measured([NO_NOISE, Way("project", "pixel"), PLAIN])
    assert [row["way"] for row in rows] == ["no noise", "plain"]
    (failure,) = failures
    assert failure.startswith("tiny, eager, project pixel: ValueError: granularity must be one of")


def test_a_loss_that_is_not_finite_is_a_failure(monkeypatch):
    monkeypatch.setattr(bmrs, "kl_divergence", lambda model, weight: torch.tensor(torch.nan))
    rows, failures = measured([NO_NOISE, PROJECT])
    assert [row["way"] for row in rows] == ["no noise"]
    assert failures == ["tiny, eager, project element: FloatingPointError: the loss is nan"]


def test_without_a_partner_nothing_is_measured():
    def refuse(granularity, backend):
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        measured(network=replace(TINY, build=refuse))


def test_what_was_measured_is_kept_if_the_rest_fails(tiny_networks, tmp_path, monkeypatch):
    measured = step.measure_network

    def fail_on_the_second(network, *arguments, **options):
        if network.name == "other":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(network, *arguments, **options)

    monkeypatch.setattr(step, "measure_network", fail_on_the_second)
    options = ["--networks", "mlp", "vit", "--granularities", "element", "--rounds", "1", "--device", "cpu"]
    with pytest.raises(torch.OutOfMemoryError):
        main(["step", *options, "--record", str(tmp_path), "--commit", "abc1234"])
    (rows,) = records.load("step", tmp_path).values()
    assert {row["network"] for row in rows} == {"tiny"}
    assert {row["environment"]["commit"] for row in rows} == {"abc1234"}


def test_command_prints_and_keeps_its_rows(tiny_networks, tmp_path, monkeypatch, capsys):
    common = ["--rounds", "1", "--device", "cpu", "--record", str(tmp_path)]
    assert main(["step", "--networks", "mlp", "--granularities", "element", "sample", *common]) == 0
    printed = capsys.readouterr().out
    assert "| tiny | eager, float32 | plain | element |" in printed
    assert "| tiny | eager, float32 | plain | sample |" not in printed  # the same thing
    assert "whole network" not in printed
    assert main(["step", "--networks", "vit", "--granularities", "batch", *common]) == 0
    assert "| 2.5 (the whole network) |" in capsys.readouterr().out
    # Other networks keep their rows, the same network's are replaced.
    assert main(["step", "--networks", "vit", "--granularities", "sample", *common]) == 0
    (rows,) = records.load("step", tmp_path).values()
    found = {(row["network"], row["stand_in"], row["way"], row["granularity"]) for row in rows}
    assert {("tiny", False, "project", "element"), ("other", True, "project", "sample")} <= found
    assert ("other", True, "project", "batch") not in found
    # So do other modes of the same network.
    compiled = ["--networks", "vit", "--granularities", "sample", "--modes", "compiled"]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert main(["step", *compiled, *common]) == 0
    (rows_with_both,) = records.load("step", tmp_path).values()
    assert [row for row in rows_with_both if row["mode"] == "eager"] == rows
    assert any(row["mode"] == "compiled" for row in rows_with_both)
    assert all(KEYS | {"suite", "machine", "environment"} == row.keys() for row in rows)
    assert len(found) == len(rows)


def test_command_keeps_nothing_unasked_and_says_what_failed(tiny_networks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "save", None)
    monkeypatch.setattr(bmrs, "kl_divergence", lambda model, weight: torch.tensor(torch.inf))
    options = ["--networks", "mlp", "--granularities", "element", "--rounds", "1", "--device", "cpu"]
    assert main(["step", *options]) == 1
    printed = capsys.readouterr().out
    assert "Not measured:" in printed
    assert "- tiny, eager, project element: FloatingPointError: the loss is inf" in printed


@pytest.mark.parametrize(
    "option",
    [
        *("--networks=alexnet", "--granularities=pixel", "--dtype=float16", "--rounds=0", "--device=abacus"),
        "--modes=lazy",
    ],
)
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["step", option])
    assert option.partition("=")[0] in capsys.readouterr().err
