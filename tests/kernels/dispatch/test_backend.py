"""Which implementation runs, and whether torch meets it as an operator."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from bmrs_kernels import kl_divergence, multiply_noise, philox_uniform
from bmrs_kernels.dispatch import backend
from bmrs_kernels.dispatch.backend import resolve_backend
from bmrs_kernels.dispatch.registration import dispatcher_is_needed

ON_CPU, ELSEWHERE = torch.empty(0), torch.empty(0, device="meta")


def forget():
    """Look at numba anew."""
    backend._numba_compiles.cache_clear()
    backend._numba_fault.cache_clear()


def arguments():
    """Return x, μ and log σ."""
    return torch.ones(4, 3), torch.full((3,), -1.0, requires_grad=True), torch.zeros(3, requires_grad=True)


class TestResolution:
    def test_auto_takes_numba_on_a_cpu_and_torch_on_devices_without_a_backend(self):
        assert resolve_backend("auto", ON_CPU) == "numba"
        assert resolve_backend("auto", ELSEWHERE) == "torch"
        assert resolve_backend("torch", ON_CPU) == "torch"
        assert resolve_backend("numba", ON_CPU) == "numba"

    def test_auto_without_numba_takes_torch(self, monkeypatch):
        monkeypatch.setattr(backend, "NUMBA_IS_INSTALLED", False)
        assert resolve_backend("auto", ON_CPU) == "torch"
        with pytest.raises(RuntimeError, match="needs numba, which is not installed: pip install numba"):
            resolve_backend("numba", ON_CPU)

    def test_numba_serves_cpu_tensors_alone(self):
        with pytest.raises(RuntimeError, match='backend="numba" needs a CPU tensor, got one on meta'):
            resolve_backend("numba", ELSEWHERE)

    def test_a_numba_that_cannot_be_imported_is_told_once(self, monkeypatch):
        def refuse(name):
            raise ImportError("Numba needs NumPy 2.3 or less. Got NumPy 2.4.")

        forget()
        monkeypatch.setattr(importlib, "import_module", refuse)
        try:
            with pytest.warns(UserWarning, match=r"cannot be used.*Numba needs NumPy 2\.3 or less"):
                assert resolve_backend("auto", ON_CPU) == "torch"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert resolve_backend("auto", ON_CPU) == "torch"
            with pytest.raises(
                RuntimeError, match=r'backend="numba" needs a numba that compiles, but Numba needs'
            ):
                resolve_backend("numba", ON_CPU)
        finally:
            forget()

    @pytest.mark.slow
    def test_a_numba_that_cannot_compile_is_told_in_compiled_functions_too(self):
        """Numba looks at its switch once a process."""
        code = """
import warnings, torch
from bmrs_kernels import kl_divergence, multiply_noise, philox_uniform, sample_noise

def all_of_them(mu, log_sigma, backend):
    uniform = philox_uniform(torch.tensor(3), (2, 3), device="cpu", backend=backend)
    theta = sample_noise(mu, log_sigma, uniform, backend=backend)
    return multiply_noise(theta, mu, log_sigma, seed=3, backend=backend) * kl_divergence(mu, log_sigma, backend=backend)

mu, log_sigma = torch.full((3,), -1.0, requires_grad=True), torch.zeros(3)
compiled = torch.compile(all_of_them, backend="aot_eager", fullgraph=True)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    gradient, = torch.autograd.grad(compiled(mu, log_sigma, "auto").sum(), mu)
assert any("NUMBA_DISABLE_JIT is set" in str(warning.message) for warning in told), told
expected, = torch.autograd.grad(all_of_them(mu, log_sigma, "torch").sum(), mu)
assert torch.equal(gradient, expected)
for function in (compiled, all_of_them):
    try:
        function(mu, log_sigma, "numba")
    except RuntimeError as error:
        assert 'backend="numba" needs a numba that compiles' in str(error), error
    else:
        raise AssertionError("numba ran")
"""
        environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    def test_exported_programs_decide_where_they_run(self, monkeypatch):
        class Divergence(torch.nn.Module):
            def forward(self, mu):
                return kl_divergence(mu, torch.zeros_like(mu))

        mu = torch.linspace(-2, 1, 4)
        exported = torch.export.export(Divergence(), (mu,)).module()
        monkeypatch.setattr(backend, "NUMBA_IS_INSTALLED", False)
        assert torch.equal(exported(mu), kl_divergence(mu, torch.zeros(4), backend="torch"))


class TestDispatcher:
    def test_eager_calls_do_without_it(self):
        x, mu, log_sigma = arguments()
        assert not dispatcher_is_needed(x, mu, log_sigma, None)
        with torch.profiler.profile(acc_events=True) as profile:
            out = multiply_noise(x, mu, log_sigma).sum() + kl_divergence(mu, log_sigma).sum()
            out.backward()
        names = {event.name for event in profile.events()}
        assert not [name for name in names if name.startswith("bmrs_kernels::")]

    def test_second_derivatives_meet_the_operator_that_forbids_them(self):
        x, mu, log_sigma = arguments()
        (first,) = torch.autograd.grad(multiply_noise(x, mu, log_sigma).sum(), mu, create_graph=True)
        with pytest.raises(NotImplementedError, match="bmrs_kernels has no second derivatives"):
            torch.autograd.grad(first.sum(), mu)

    def test_fake_tensors_stay_fake(self):
        with FakeTensorMode():
            x, mu, log_sigma = arguments()
            out = multiply_noise(x, mu, log_sigma, seed=torch.tensor(3))
            assert type(out).__name__ == "FakeTensor"
            assert out.shape == (4, 3)
            assert type(kl_divergence(mu, log_sigma)).__name__ == "FakeTensor"

    def test_modes_see_the_operator(self):
        x, mu, log_sigma = arguments()
        with FlopCounterMode(display=False):
            assert dispatcher_is_needed(x)
            multiply_noise(x, mu, log_sigma)
        assert not dispatcher_is_needed(x)

    def test_traces_hold_the_operator(self):
        x, mu, log_sigma = (part.detach() for part in arguments())
        traced = make_fx(lambda *inputs: multiply_noise(*inputs, seed=torch.tensor(3)))(x, mu, log_sigma)
        assert "bmrs_kernels.multiply_noise" in traced.code
        assert torch.equal(traced(x, mu, log_sigma), multiply_noise(x, mu, log_sigma, seed=3))

    def test_subclasses_reach_their_own_dispatch(self):
        class Marked(torch.Tensor):
            pass

        assert dispatcher_is_needed(torch.ones(2).as_subclass(Marked))
        assert not dispatcher_is_needed(torch.nn.Parameter(torch.ones(2)))

    def test_published_uniforms_can_be_traced(self):
        compiled = torch.compile(
            lambda seed: philox_uniform(seed, (5,), device="cpu"), fullgraph=True, backend="aot_eager"
        )
        seed = torch.tensor(9)
        assert torch.equal(compiled(seed), philox_uniform(seed, (5,), device="cpu"))
