"""Noise layers in models that transformers loads with ``from_pretrained``.

Tensors that a checkpoint lacks come off the meta device as uninitialised memory there, and only layers that
transformers knows are then initialised. It notes in an attribute of every layer when it is through with it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def initialise_what_was_not_loaded(layer: Any) -> None:
    """Set the tensors of a noise layer that transformers has not marked as loaded to their initial values."""
    if not _marks_what_it_loads():
        return
    loaded = {
        name: tensor.clone()
        for name in ("mu", "log_sigma", "mask", "pruned")
        if getattr(tensor := getattr(layer, name), "_is_hf_initialized", False)
    }
    layer.reset_parameters()
    pruned = loaded.pop("pruned", layer.pruned)
    if "mask" in loaded:
        layer.set_kept(loaded.pop("mask") > pruned)
    with torch.no_grad():
        for name, values in loaded.items():
            getattr(layer, name).copy_(values)


def _marks_what_it_loads() -> bool:
    """Return whether this is transformers 5 or later, which marks each tensor that it has loaded."""
    module = sys.modules.get("transformers")
    return module is not None and int(module.__version__.partition(".")[0]) >= 5
