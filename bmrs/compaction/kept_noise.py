"""Noise that stays in a compacted network: the posteriors of the structures that stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bmrs.compaction.cutting import Cut, Selection
from bmrs.graph.analysis import Analysis
from bmrs.graph.channels import without_repetition
from bmrs.graph.copies import copied
from bmrs.noise.layer import NoiseLayer


def narrowed_noise(
    analysis: Analysis, the_cut: Cut, layers: Mapping[str, NoiseLayer]
) -> dict[str, NoiseLayer]:
    """Return noise layers for a smaller network, each with the parameters and masks of the structures that stay.

    What stays of ``mu`` and ``log_sigma`` is added to the selections of the cut.

    Args:
        analysis: the network, in which noise is marked.
        the_cut: its smaller tensors.
        layers: its noise layers by name.

    Raises:
        ValueError: noise of a structure that is not pruned acts on a constant that leaves, or structures would come out
            at different sizes; the layer is named.
    """
    result = {}
    for name, layer in layers.items():
        _check_constants(analysis, name, layer)
        entries = the_cut.selections.get(f"{name}.factors", Selection({})).axes.get(0)
        narrow: NoiseLayer = copied(layer, share=True)  # type: ignore[assignment]
        structures = torch.arange(layer.num_structures)
        if entries is not None:
            structures, narrow.structure_size = _structures(entries, layer.structure_size, name)
            for key in ("mu", "log_sigma"):
                the_cut.selections[f"{name}.{key}"] = Selection({0: structures})
        narrow.num_structures, narrow.compacted, narrow.generator = len(structures), True, layer.generator
        for key, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            values = tensor.detach()[structures.to(tensor.device)].clone()
            trained = isinstance(tensor, nn.Parameter)
            setattr(
                narrow, key, nn.Parameter(values, requires_grad=tensor.requires_grad) if trained else values
            )
        result[name] = narrow.eval()
    return result


def _structures(entries: Tensor, size: int, name: str) -> tuple[Tensor, int]:
    """Return the structures that entries along a dimension belong to, and how many each of them has."""
    structures, counts = (entries // size).unique(return_counts=True)
    if len(counts.unique()) != 1:
        raise ValueError(
            f"keep_noise cannot cut noise layer {name!r}: parts of {counts.tolist()} entries stay of its structures of "
            f"{size}, expected as many of each; compact without keep_noise"
        )
    return structures, int(counts[0])


def _check_constants(analysis: Analysis, name: str, layer: NoiseLayer) -> None:
    """Raise ValueError where a constant that leaves is multiplied by noise, which a bias cannot take up."""
    for call in analysis.noise_calls(name):
        axis, x = call["dim"] % len(call.shape), call["x"]
        channels = x.layer_along(axis)
        if x.constant is None or channels is None:
            continue
        leaves = ~analysis.stays(without_repetition(channels)[0])
        others = [d for d in range(leaves.dim()) if d != axis]
        constant = x.constant.expand(x.shape).nan_to_num(0.0) != 0
        meets = constant.amax(dim=others) if others else constant
        leaves = (leaves.amin(dim=others) if others else leaves).expand(len(meets)) & meets
        kept = layer.spread(layer.kept).cpu()
        if count := int((leaves & kept).sum()):
            raise ValueError(
                f"keep_noise cannot keep the noise of {name!r}: {count} of its entries that are not pruned multiply a "
                "constant, of what is pruned in front of them, that compaction moves into a bias: prune these too, or "
                "compact without keep_noise"
            )
