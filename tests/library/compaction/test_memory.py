"""What compaction allocates beside the model, counted by the allocator."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import bmrs

# Torch 2.11 warns of cycles, of which there is one here; keeping their events would take seconds.
pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler clears events")

_WIDTH = 256


class _Pairs(nn.Module):
    """Many layers of one size; with sizes in the code, so that it becomes a graph of operators once it is narrower."""

    def __init__(self, *, fixed_sizes: bool) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(12))
        self.second = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(12))
        self.fixed_sizes = fixed_sizes

    def forward(self, x):
        for first, second in zip(self.first, self.second, strict=True):
            hidden = first(x)
            x = second(hidden.view(-1, _WIDTH) if self.fixed_sizes else hidden)
        return x


def _most_allocated(call):
    """Return the bytes that a call had allocated at its peak, and what it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, result


def _check(*, fixed_sizes, form):
    torch.manual_seed(0)
    model = _Pairs(fixed_sizes=fixed_sizes).eval()
    own = sum(p.nbytes for p in model.parameters())
    noisy = bmrs.add_noise(model, where=lambda name, _: name.startswith("first."))
    for name, module in noisy.named_modules():
        if isinstance(module, bmrs.NoiseLayer):
            module.set_kept(torch.arange(_WIDTH) > int(name.split(".")[1]))
    most, compacted = _most_allocated(lambda: bmrs.compact(noisy, torch.randn(2, _WIDTH)))
    report = bmrs.compact_report(compacted)
    assert (report.form, report.compared_in) == (form, "float64")
    assert 0.9 * own < report.bytes_after < own
    assert most <= 1.3 * own


def test_of_a_large_model_little_more_than_the_result_is_allocated():
    _check(fixed_sizes=False, form="module")


def test_a_graph_of_operators_takes_no_more():
    _check(fixed_sizes=True, form="graph")
