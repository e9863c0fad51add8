from __future__ import annotations

import math

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New memory is full of NaN, which stays wherever a kernel does not write."""

    def poisoned(allocate):
        def allocate_poisoned(*arguments, **options):
            memory = allocate(*arguments, **options)
            return memory.fill_(math.nan) if memory.is_floating_point() else memory

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
