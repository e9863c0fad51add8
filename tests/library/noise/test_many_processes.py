"""Noise, KL, pruning and compaction where several processes train one model, against what a single process gets."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from several_processes import results_together
from torch import distributed, nn

import bmrs
import bmrs_kernels
from bmrs.noise.lookup import noise_layers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


class Network(nn.Module):
    """A block as tensor parallelism cuts it: heads and hidden units are spread, and summed by the next layer."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Linear(6, 8)
        self.o_proj = nn.Linear(8, 6)
        self.hidden = nn.Linear(6, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        x = x + self.o_proj(self.heads(x).tanh())
        return self.out(self.hidden(x).relu())


def network(prepare=lambda model: model, **options):
    """Return the network with noise on heads, on hidden units and on the sums that the last layer makes.

    So narrow a posterior that different draws are alike to eight digits.
    """
    torch.manual_seed(0)
    model = prepare(Network().double())
    bmrs.add_noise(model, where="hidden", **options)
    bmrs.add_noise(model, where="out", **options)
    bmrs.add_noise(model, where="o_proj", structures="heads", num_heads=4, **options)
    with torch.no_grad():
        for layer in noise_layers(model).values():
            values = torch.linspace(-4.0, -0.1, layer.num_structures, dtype=torch.float64)
            layer.mu.copy_(values if not is_dtensor(layer.mu) else spread_like(values, layer.mu))
            layer.log_sigma.fill_(-20.0)
    return model


def is_dtensor(tensor):
    return isinstance(tensor, distributed.tensor.DTensor)


def spread_like(values, tensor):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, tensor.device_mesh, tensor.placements)


def whole(tensor):
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (8,), generator=generator)


def gradients(model, share=0, of=1, *, kl_first=False):
    """Return the loss, the KL term and the gradients of a step on a share of the data; log σ's own noise left out."""
    inputs, labels = (tensor.chunk(of)[share] for tensor in data())
    model.train()
    if kl_first:
        divergence = bmrs.kl_divergence(model, weight=0.01)
    loss = F.cross_entropy(model(inputs), labels)
    if not kl_first:
        divergence = bmrs.kl_divergence(model, weight=0.01)
    (loss + divergence).backward()
    grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {"kl": divergence.detach(), **{name.removeprefix("module."): grad for name, grad in grads.items()}}


def decisions(model):
    """Prune by one rule of each kind and return masks and reports."""
    found = {}
    hidden = getattr(model, "module", model).hidden
    decision = bmrs.L2(ratio=0.3)(hidden.noise, hidden)
    found["L2"] = decision.scores.tolist(), decision.prune.tolist()
    for criterion in (bmrs.BMRSOdds(p1=4), bmrs.Mean(threshold=0.2)):
        found[repr(criterion)] = str(bmrs.prune(model, criterion))
    masks = {name: whole(layer.mask).clone() for name, layer in noise_layers(model).items()}
    return found, masks


def refusal(function, *arguments, **options):
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*arguments, **options)
    return str(caught.value)


def on_two_processes(folder):
    return {
        "late": late_kl(),
        "learned": learned(),
        "refused": refusals_of_wrappers(),
        "ddp": with_ddp(),
        "fsdp": with_fsdp(folder),
        "tensor": with_tensor_parallelism(folder),
        "functions": functions_of_dtensors(),
    }


def with_ddp():
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = nn.parallel.DistributedDataParallel(network())
    found = {"gradients": gradients(model, rank, world)}
    found["refusal"] = refusal(bmrs.add_noise, nn.Sequential(model), where="*.heads")
    found["shares"] = bmrs.kl_divergence(model, weight=dict.fromkeys(noise_layers(network()), 0.1)).detach()
    found["decisions"] = decisions(model)
    if rank == 0:  # the other process does not take part
        found["compacted"] = bmrs.compact(model, data()[0])(data()[0])
    # Pruned by one process alone: at the next step DDP tells the others.
    model = nn.parallel.DistributedDataParallel(network())
    if rank == 0:
        bmrs.prune(model, bmrs.BMRSOdds(p1=4))
    model(data()[0])
    found["told"] = {name: layer.kept.clone() for name, layer in noise_layers(model).items()}
    return found


def with_fsdp(folder):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rank, world = distributed.get_rank(), distributed.get_world_size()
    found = {"gradients": []}
    for each_layer, kl_first in itertools.product((False, True), repeat=2):
        model = network()
        if each_layer:
            for layer in (model.heads, model.o_proj, model.hidden):
                fully_shard(layer)
        fully_shard(model)
        for _ in range(2):
            found["gradients"].append(gradients(model, rank, world, kl_first=kl_first))
    found["refusals"] = [
        refusal(bmrs.add_noise, model, where="heads"),
        refusal(bmrs.compact, model, data()[0]),
        refusal(bmrs.prune, model, bmrs.SNR(), example_inputs=data()[0]),
    ]
    found["decisions"] = decisions(model)
    checkpoint.save(model.state_dict(), checkpoint_id=folder)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        copied = network()
        copied.load_state_dict(full)
        found["compacted"] = bmrs.compact(copied, data()[0])(data()[0])

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_shard(network().float(), mp_policy=policy)
    found["narrow"] = refusal(model, data()[0].float())
    model = network().float()
    noise = [layer for layer in model.modules() if isinstance(layer, bmrs.NoiseLayer)]
    fully_shard(noise)
    fully_shard(model, mp_policy=policy)
    dtypes = []
    for layer in noise:
        layer.register_forward_hook(
            lambda layer, inputs, output: dtypes.append((layer.mu.dtype, output.dtype))
        )
    outputs = model(data()[0].float())
    (outputs.float().square().mean() + bmrs.kl_divergence(model, weight=0.01)).backward()
    found["wide"] = dtypes, outputs.dtype, [layer.mu.grad.dtype for layer in noise]
    return found


LATE = {
    "KL after the loss": (False, False),
    "KL before forward, with whole parameters": (True, True),
}


def late_kl():
    """Return the error, or else the gradients, where backward of KL comes after that of the loss."""
    from torch.distributed.fsdp import fully_shard

    rank, world = distributed.get_rank(), distributed.get_world_size()
    inputs, labels = (tensor.chunk(world)[rank] for tensor in data())
    found = {}
    for case, (kl_first, at_once) in LATE.items():
        model = network().train()
        fully_shard(
            [layer for layer in model.modules() if isinstance(layer, bmrs.NoiseLayer)],
            reshard_after_forward=False,
        )
        fully_shard(model)
        if kl_first:
            model.set_requires_gradient_sync(False)
            model.set_reshard_after_backward(False)
            (0 * F.cross_entropy(model(inputs), labels)).backward()
            model.set_requires_gradient_sync(True)
            model.set_reshard_after_backward(True)
            divergence = bmrs.kl_divergence(model, weight=0.01)
        loss = F.cross_entropy(model(inputs), labels)
        if not kl_first:
            divergence = bmrs.kl_divergence(model, weight=0.01)
        try:
            if at_once:
                (loss + divergence).backward()
            else:
                loss.backward()
                divergence.backward()
        except RuntimeError as error:
            found[case] = str(error)
        else:
            found[case] = whole(model.hidden.noise.mu.grad)
    return found


def learned():
    """Return posteriors that processes learned together on sharded parameters, and what one learned alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world = distributed.get_rank(), distributed.get_world_size()

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def posteriors(model, batch):
        options = {"dataset_size": 8, "max_distance": 0.2, "across_processes": False}
        report = bmrs.learn_posteriors(model, [batch], loss, **options)
        return str(report), [whole(layer.mu.detach()) for layer in noise_layers(model).values()]

    mesh = init_device_mesh("cpu", (world,))
    return {
        "alone": posteriors(network(), data()),
        "fsdp": posteriors(fully_shard(network()), tuple(tensor.chunk(world)[rank] for tensor in data())),
        "tensor": posteriors(network(in_tensor_parallel(mesh)), data()),
    }


def refusals_of_wrappers():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def learn(model, across_processes):
        bmrs.learn_posteriors(model, [], None, dataset_size=1, across_processes=across_processes)

    found = {
        "frozen in DDP": refusal(learn, nn.parallel.DistributedDataParallel(network()), False),
        "averaged twice": refusal(learn, fully_shard(network()), True),
    }
    for original in (True, False):
        cut = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
        found[f"cut {original}"] = refusal(bmrs.kl_divergence, cut, weight=1.0)
        found[f"cut {original} before pruning"] = refusal(bmrs.prune, cut, bmrs.SNR())
    mesh = init_device_mesh("cpu", (1, distributed.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = in_tensor_parallel(mesh["tensor"])(Network())
    model.own = bmrs.NoiseLayer(3)
    fully_shard(model, mesh=mesh["data"])
    found["left out"] = refusal(bmrs.parameter_groups, model, lr=0.1)
    model.own.same_on_all_ranks = True
    bmrs.parameter_groups(model, lr=0.1)
    return found


def in_tensor_parallel(mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        "heads": ColwiseParallel(),
        "o_proj": RowwiseParallel(),
        "hidden": ColwiseParallel(),
        "out": RowwiseParallel(),
    }
    return lambda model: parallelize_module(model, mesh, plan)


def with_tensor_parallelism(folder):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    inputs, _ = data()
    found = {}
    model = network(in_tensor_parallel(mesh))
    found["gradients"] = [gradients(model)]

    # With noise that shows: the processes' copies of the sums must agree, and so must what they are multiplied by.
    wide = network(in_tensor_parallel(mesh))
    with torch.no_grad():
        for layer in noise_layers(wide).values():
            layer.log_sigma.fill_(0.0)
    first, second = wide(inputs), wide(inputs)
    found["noisy"] = first.detach().clone(), second.detach().clone()
    hidden = {}
    wide.hidden.noise.register_forward_hook(lambda layer, x, y: hidden.update(x=x[0], y=y))
    wide(inputs)
    found["hidden"] = (hidden["y"] / hidden["x"]).full_tensor().detach()
    found["placements"] = str(hidden["y"].placements)

    found["compiled"] = torch.compile(model, backend="eager")(inputs).detach(), model(inputs).detach()
    model.eval()
    found["outputs"] = model(inputs).detach()
    found["decisions"] = decisions(model)
    found["pruned outputs"] = model(inputs).detach()

    partly = Network().double()
    in_tensor_parallel(mesh)(partly)
    partly.norm = nn.LayerNorm(6).double()
    found["refusals"] = [
        refusal(bmrs.add_noise, partly, where="norm"),
        refusal(bmrs.NoiseLayer(10).double(), hidden["x"]),
        refusal(wide.hidden.noise, torch.ones(8, 10).double()),
    ]
    bmrs.add_noise(partly, where="norm", same_on_all_ranks=True)
    partly.norm.noise.same_on_all_ranks = False
    found["refusals"].append(refusal(bmrs.kl_divergence, partly, weight=1.0))
    own, alike = (torch.Generator().manual_seed(seed) for seed in (distributed.get_rank(), 7))
    spread = in_tensor_parallel(mesh)(Network())
    found["refusals"].append(refusal(bmrs.add_noise, spread, where="hidden", generator=own))
    torch.manual_seed(distributed.get_rank())
    found["refusals"].append(refusal(bmrs.add_noise, spread, where="hidden"))
    bmrs.add_noise(spread, where="hidden", generator=alike)
    return found


FUNCTIONS = {
    "kl_divergence": bmrs_kernels.kl_divergence,
    "delta_f_lognormal": bmrs_kernels.delta_f_lognormal,
    "delta_f_loguniform": bmrs_kernels.delta_f_loguniform,
    "noise_mean": bmrs_kernels.noise_mean,
}


def functions_of_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    found = {}
    torch.manual_seed(3)
    mu, log_sigma, uniform = torch.rand(3, 5, dtype=torch.float64).unbind()
    for name, function in FUNCTIONS.items():
        plain = [tensor.clone().requires_grad_() for tensor in (-4 * mu, -log_sigma)]
        expected = function(*plain)
        expected.sum().backward()
        for placement in (Shard(0), Replicate()):
            spread = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in plain]
            result = function(*spread)
            assert result.placements == (placement,)
            result.sum().backward()
            found[f"{name} {placement}"] = [
                (whole(result), expected.detach()),
                *((whole(s.grad), p.grad) for s, p in zip(spread, plain, strict=True)),
            ]
    spread = [distribute_tensor(t, mesh, [Shard(0)]) for t in (-4 * mu, -log_sigma, uniform)]
    found["sample_noise"] = [
        (whole(bmrs_kernels.sample_noise(*spread)), bmrs_kernels.sample_noise(-4 * mu, -log_sigma, uniform))
    ]
    found["noise_snr"] = [
        (whole(bmrs_kernels.noise_snr(*spread[:2])), bmrs_kernels.noise_snr(-4 * mu, -log_sigma))
    ]
    message = refusal(bmrs_kernels.kl_divergence, spread[0], -log_sigma)
    assert "log_sigma must be a DTensor as mu is one, got a plain tensor" in message, message
    row = torch.rand(2, 1, dtype=torch.float64)
    found["sample_noise, broadcast"] = [
        (
            whole(bmrs_kernels.sample_noise(*spread[:2], distribute_tensor(row, mesh, [Shard(0)]))),
            bmrs_kernels.sample_noise(-4 * mu, -log_sigma, row),
        )
    ]
    for granularity, activation, placement in itertools.product(
        ("element", "sample", "batch"), (None, "relu"), (Shard(0), Shard(1), Shard(2), Replicate(), Partial())
    ):
        torch.manual_seed(7)
        x = torch.randn(4, 5, 6, dtype=torch.float64)
        grad = torch.randn(4, 5, 6, dtype=torch.float64)
        mask = torch.tensor([True, True, False, True, True])
        options = {"granularity": granularity, "activation": activation}
        if placement == Partial():
            parts = distributed.tensor.DTensor.from_local(x / mesh.size(), mesh, [placement])
        else:
            parts = distribute_tensor(x, mesh, [placement])
        leaves = [
            parts.detach().requires_grad_(),
            *(distribute_tensor(t, mesh, [Replicate()]).requires_grad_() for t in (-4 * mu, -log_sigma)),
        ]
        result = bmrs_kernels.multiply_noise(
            *leaves, mask=distribute_tensor(mask, mesh, [Replicate()]), seed=11, **options
        )
        result.backward(distribute_tensor(grad, mesh, [Replicate()]))
        found[granularity, activation, repr(placement)] = {
            "placement": repr(result.placements[0]),
            "local": result.to_local().detach(),
            "result": whole(result).detach(),
            "gradients": [whole(leaf.grad) for leaf in leaves],
            "inputs": (x, grad, -4 * mu, -log_sigma, mask),
        }
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    return results_together(on_two_processes, folder, world=2), folder


@pytest.fixture(scope="module")
def expected():
    return gradients(network())


def same_gradients(found, expected):
    for each in found if isinstance(found, list) else [found]:
        assert each.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                each[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("way", ["ddp", "fsdp", "tensor"])
class TestEachWay:
    def test_gradients_are_those_of_one_process(self, two, expected, way):
        for result in two[0]:
            same_gradients(result[way]["gradients"], expected)

    def test_decisions_are_those_of_one_process(self, two, way):
        reports, masks = decisions(network())
        assert any(0 < mask.sum() < len(mask) for mask in masks.values())
        for result in two[0]:
            found_reports, found_masks = result[way]["decisions"]
            assert {name: found_masks[name].tolist() for name in masks} == {
                n: m.tolist() for n, m in masks.items()
            }
            assert found_reports == reports


class TestDDP:
    def test_names_are_those_without_the_wrapper(self, two):
        alone = bmrs.kl_divergence(network(), weight=0.1)
        for result in two[0]:
            torch.testing.assert_close(result["ddp"]["shares"], alone.detach())

    def test_compacts_in_one_process(self, two):
        model = network()
        decisions(model)
        torch.testing.assert_close(two[0][0]["ddp"]["compacted"], bmrs.compact(model, data()[0])(data()[0]))

    def test_pruning_in_one_process_reaches_the_others(self, two):
        told = [result["ddp"]["told"] for result in two[0]]
        assert not all(kept.all() for kept in told[1].values())
        for name, kept in told[0].items():
            assert torch.equal(kept, told[1][name])

    def test_noise_is_not_added_inside(self, two):
        assert "before DistributedDataParallel wraps it or a part of it" in two[0][0]["ddp"]["refusal"]


class TestFSDP:
    def test_compacts_from_a_full_state(self, two):
        model = network()
        decisions(model)
        torch.testing.assert_close(two[0][0]["fsdp"]["compacted"], bmrs.compact(model, data()[0])(data()[0]))

    def test_distributed_checkpoint_loads_in_one_process(self, two):
        from torch.distributed import checkpoint

        model, pruned = network(), network()
        decisions(pruned)
        state = model.state_dict()
        checkpoint.load(state, checkpoint_id=two[1], no_dist=True)
        model.load_state_dict(state)
        for name, value in pruned.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_what_cannot_be_done_on_shards_is_refused(self, two):
        for result in two[0]:
            added, compacted, pruned = result["fsdp"]["refusals"]
            assert "before fully_shard wraps it" in added
            assert "full_state_dict=True" in compacted
            assert "full_state_dict=True" in pruned

    def test_mixed_precision_must_not_narrow_the_noise(self, two):
        for result in two[0]:
            assert "32 bits or more, got torch.bfloat16" in result["fsdp"]["narrow"]
            assert "fully_shard([layer for layer in" in result["fsdp"]["narrow"]
            dtypes, of_outputs, of_gradients = result["fsdp"]["wide"]
            assert dtypes == [(torch.float32, torch.bfloat16)] * 3
            assert of_outputs == torch.bfloat16
            assert of_gradients == [torch.float32] * 3


class TestTensorParallelism:
    def test_outputs_are_those_of_one_process(self, two):
        model = network().eval()
        inputs, _ = data()
        for result in two[0]:
            torch.testing.assert_close(result["tensor"]["outputs"], model(inputs).detach())
        decisions(model)
        for result in two[0]:
            torch.testing.assert_close(result["tensor"]["pruned outputs"], model(inputs).detach())

    def test_copies_have_one_noise_and_shards_their_own(self, two):
        first, second = (result["tensor"] for result in two[0])
        assert torch.equal(first["noisy"][0], second["noisy"][0])
        assert not torch.equal(first["noisy"][0], first["noisy"][1])
        assert first["placements"] == "(Shard(dim=1),)"
        cut = first["hidden"][:, :5].log(), first["hidden"][:, 5:].log()
        finite = cut[0].isfinite() & cut[1].isfinite()
        assert finite.sum() > 10
        assert torch.corrcoef(torch.stack([part[finite] for part in cut]))[0, 1].abs() < 0.9

    def test_what_would_differ_between_processes_is_refused(self, two):
        for result in two[0]:
            left_out, plain, whole_x, left_out_later, own_seeds, seeds = result["tensor"]["refusals"]
            assert "'norm' is not, so that each process would multiply its copy" in left_out
            assert (
                "x is a DTensor and the noise layer is not: call add_noise after parallelize_module" in plain
            )
            assert "the noise layer is a DTensor and x is not" in whole_x
            assert "'norm.noise' is not" in left_out_later
            assert "torch.initial_seed() is [0, 1]" in seeds
            assert "generator.initial_seed() is [0, 1]" in own_seeds

    def test_compiles(self, two):
        for result in two[0]:
            torch.testing.assert_close(*result["tensor"]["compiled"])


class TestSharded:
    @pytest.mark.parametrize("case", LATE)
    def test_a_gradient_of_kl_that_would_be_lost_raises(self, two, case):
        for result in two[0]:
            assert "KL gradient of noise layer" in str(result["late"][case])
            assert "call kl_divergence after the forward pass" in result["late"][case]

    @pytest.mark.parametrize("way", ["fsdp", "tensor"])
    def test_posteriors_are_learned_as_by_one_process(self, two, way):
        for result in two[0]:
            report, values = result["learned"][way]
            assert report == result["learned"]["alone"][0]
            for found, value in zip(values, result["learned"]["alone"][1], strict=True):
                torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)

    def test_wrappers_that_do_not_suit_are_refused(self, two):
        for result in two[0]:
            refused = dict(result["refused"])
            assert "give it the module inside" in refused.pop("frozen in DDP")
            assert "give across_processes=False in all processes" in refused.pop("averaged twice")
            assert "'own' is not, so that each process would multiply" in refused.pop("left out")
            assert len(refused) == 4
            for message in refused.values():
                assert "must be whole, and FullyShardedDataParallel has cut it" in message


class TestFunctions:
    def test_elementwise_ones(self, two):
        for result in two[0]:
            for name, pairs in result["functions"].items():
                if isinstance(name, str):
                    for found, value in pairs:
                        torch.testing.assert_close(found, value, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("granularity", ["element", "sample", "batch"])
    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_noise(self, two, granularity, activation):
        for axis in ("Shard(dim=0)", "Shard(dim=1)", "Shard(dim=2)", "Replicate()", "Partial(sum)"):
            parts = [result["functions"][granularity, activation, axis] for result in two[0]]
            x, grad, mu, log_sigma, mask = parts[0]["inputs"]
            options = {"granularity": granularity, "activation": activation}
            leaves = [t.clone().requires_grad_() for t in (x, mu, log_sigma)]
            alone = bmrs_kernels.multiply_noise(*leaves, mask=mask, seed=11, **options)
            first = parts[0]["local"]
            if axis == "Partial(sum)":
                assert parts[0]["placement"] == (axis if activation is None else "Replicate()")
                first = parts[0]["result"]
            else:
                assert parts[0]["placement"] == axis
            # The first shard draws as a single process would on it.
            if axis.startswith("Shard"):
                dim = int(axis[-2])
                sizes = [part["local"].shape[dim] for part in parts]
                cut = leaves[0].split(sizes, dim)[0]
                own = (t[: sizes[0]] if dim == 1 else t for t in (*leaves[1:], mask))
                own_mu, own_log_sigma, own_mask = own
                local = bmrs_kernels.multiply_noise(
                    cut, own_mu, own_log_sigma, mask=own_mask, seed=11, **options
                )
                assert torch.equal(first, local.detach())
            else:
                torch.testing.assert_close(first, alone.detach(), rtol=1e-12, atol=0)
            drawn = {"element": "012", "sample": "01", "batch": "1"}[granularity]
            if axis[-2] not in drawn:  # each shard draws the same: all is as in a single process
                alone.backward(grad)
                for part in parts:
                    torch.testing.assert_close(part["result"], alone.detach(), rtol=1e-12, atol=0)
                    for found, leaf in zip(part["gradients"], leaves, strict=True):
                        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)
            else:
                whole_result = parts[0]["result"]
                assert not torch.equal(whole_result, alone.detach())
                # θ as drawn: the gradients in x are those of a product with it, whatever the shard.
                acts = x if activation is None else x.relu()
                theta = torch.where(acts == 0, torch.nan, whole_result / acts)
                slope = torch.ones_like(x) if activation is None else (x > 0).double()
                wanted = grad * theta * slope
                known = ~wanted.isnan()
                torch.testing.assert_close(
                    parts[0]["gradients"][0][known], wanted[known], rtol=1e-10, atol=1e-12
                )
                torch.testing.assert_close(parts[1]["gradients"], parts[0]["gradients"])


def on_four_processes(folder):
    """Data parallelism on shards and tensor parallelism at once."""
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    rank = mesh.get_local_rank("data")
    model = network(in_tensor_parallel(mesh["tensor"]))
    fully_shard(model, mesh=mesh["data"])
    found = {"gradients": [gradients(model, rank, 2) for _ in range(2)], "decisions": decisions(model)}
    checkpoint.save(model.state_dict(), checkpoint_id=folder)
    with torch.no_grad():
        for layer in noise_layers(model).values():
            layer.log_sigma.fill_(0.0)
    model.train()
    found["noisy"] = model(data()[0]).detach().clone()  # waits for it
    return found


def test_data_and_tensor_parallelism_at_once(tmp_path, expected):
    from torch.distributed import checkpoint

    results = results_together(on_four_processes, str(tmp_path), world=4)
    pruned = network()
    _, masks = decisions(pruned)
    for result in results:
        same_gradients(result["gradients"], expected)
        assert {n: m.tolist() for n, m in result["decisions"][1].items()} == {
            n: m.tolist() for n, m in masks.items()
        }
    # Copies of one model have one noise; other copies another.
    noisy = [result["noisy"] for result in results]
    assert torch.equal(noisy[0], noisy[1])
    assert torch.equal(noisy[2], noisy[3])
    assert not torch.equal(noisy[0], noisy[2])
    state = network().state_dict()
    checkpoint.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    for name, value in pruned.state_dict().items():
        assert torch.equal(state[name], value), name
