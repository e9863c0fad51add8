"""What compaction will be able to do with noise layers, before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.compaction.compact import compact_report, compacted
from bmrs.compaction.masked_model import MaskedModel
from bmrs.compaction.report import LayerCompaction
from bmrs.compaction.reporting import reasons_of_entries
from bmrs.graph.analysis import analyse
from bmrs.graph.inputs import as_inputs
from bmrs.graph.layer_norms import check_approximate
from bmrs.graph.ties import needed_layers, same_channels, sufficient_layers
from bmrs.noise.lookup import required_noise_layers
from bmrs.text_table import table_lines


@dataclass(frozen=True)
class LayerOutlook:
    """What compaction can do with a noise layer.

    Attributes:
        name: qualified name of the noise layer.
        structures: all its structures.
        removable: those that can leave, at least one of which compaction keeps.
        held_because: why others stay, with zero weights if they are pruned: reasons with numbers of structures, of all
            but the first, which was not pruned.
        together_with: noise layers that have to prune a structure too before it leaves.
        not_singly: why a single structure stays that leaves together with others of its layer; empty if it leaves.
        factor_because: why one multiplication by factors remains; empty if they go into weights.
    """

    name: str
    structures: int
    removable: int
    held_because: dict[str, int]
    together_with: tuple[str, ...]
    not_singly: str
    factor_because: str


@dataclass(frozen=True)
class NoiseOutlook:
    """What compaction can do with the noise layers of a model; ``str()`` gives a text.

    Attributes:
        layers: an entry for each noise layer.
        form: ``"module"`` or ``"graph"``, as in `CompactReport`.
        form_because: for ``"graph"``, why.
    """

    layers: tuple[LayerOutlook, ...]
    form: str
    form_because: str

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the noise layers of which no structure can leave: noise there saves nothing."""
        return tuple(layer.name for layer in self.layers if not layer.removable)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, ready for JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "held": list(self.held)}

    def __str__(self) -> str:
        header = ("noise layer", "structures", "can leave")
        rows = [
            (layer.name or "(model)", str(layer.structures), str(layer.removable)) for layer in self.layers
        ]
        lines = table_lines([header, *rows], left=0)
        for layer in self.layers:
            name = layer.name or "(model)"
            if layer.together_with:
                lines.append(f"{name}: only what {' and '.join(layer.together_with)} prune too")
            if layer.not_singly:
                lines.append(f"{name}: only several structures at once: {layer.not_singly}")
            for reason, number in layer.held_because.items():
                held = f"{number} would be kept with zero weights" if layer.removable else "nothing can leave"
                lines.append(f"{name}: {held}: {reason}")
            if layer.factor_because:
                lines.append(f"{name}: one multiplication by its factors will remain: {layer.factor_because}")
        if self.form == "graph":
            lines.append(f"a graph of operators instead of the model's own classes: {self.form_because}")
        return "\n".join(lines)


def noise_outlook(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    approximate: Collection[str] = (),
) -> NoiseOutlook:
    """Say what compaction will be able to do with the noise layers of a model, before anything is trained.

    All structures of each layer but the first are pruned in a copy, whatever its masks say, and the copy is compacted,
    so that what `bmrs.compact` would refuse is refused here. The parameters are taken as they are: a channel that is
    held because padding meets its constant is held by the bias that it has now.

    Args:
        model: a model with noise layers that `bmrs.compact` takes, in any mode; it is left as it is.
        example_inputs: as for `bmrs.compact`.
        approximate: as for `bmrs.compact`.

    Returns:
        For each noise layer how many structures can leave, and why others cannot.

    Raises:
        TypeError, ValueError, RuntimeError: as `bmrs.compact`, or the model has no noise layer.
    """
    required_noise_layers(model)
    with torch.inference_mode(False), torch.no_grad():
        masked = MaskedModel(
            model,
            as_inputs(example_inputs, model),
            few_examples=True,
            approximate=check_approximate(approximate),
        )
        partners, not_singly = _partners(masked), _reasons_of_last(masked)
        _prune_all_but_first(masked)
        report = compact_report(compacted(masked, masked.analysis()))
    layers = tuple(
        _outlook(layer, partners.get(layer.name, ()), not_singly[layer.name]) for layer in report.layers
    )
    return NoiseOutlook(layers, report.form, report.form_because)


def _outlook(layer: LayerCompaction, together_with: tuple[str, ...], not_singly: str) -> LayerOutlook:
    leaves = layer.removed > 0
    return LayerOutlook(
        name=layer.name,
        structures=layer.structures,
        removable=layer.structures - sum(layer.kept_because.values()) if leaves else 0,
        held_because=layer.kept_because or ({} if leaves else {"a layer cannot be emptied": 1}),
        together_with=together_with if leaves else (),
        not_singly=not_singly if leaves else "",
        factor_because=layer.not_folded_because,
    )


def _partners(masked: MaskedModel) -> dict[str, tuple[str, ...]]:
    """Return the other layers that have to prune a structure with each noise layer that cannot let it leave alone."""
    _keep_all(masked)
    groups = same_channels(analyse(masked.captured))
    needed = needed_layers(masked.captured, masked.factors, groups)
    alone = sufficient_layers(masked.captured, masked.factors, groups)
    return {
        name: tuple(other for other in together or () if other != name)
        for group, together, sufficient in zip(groups, needed, alone, strict=True)
        for name in group
        if name not in sufficient
    }


def _reasons_of_last(masked: MaskedModel) -> dict[str, str]:
    """Return why the last structure of each noise layer stays if it is pruned alone of its layer; "" if it leaves."""
    _keep_all(masked)
    for name, layer in masked.layers.items():
        masked.factors[name][-layer.structure_size :] = 0.0
    analysis = analyse(masked.captured)
    reasons = {
        name: reasons_of_entries(analysis, name)[-layer.structure_size :]
        for name, layer in masked.layers.items()
    }
    return {name: next(filter(None, of_entries), "") for name, of_entries in reasons.items()}


def _keep_all(masked: MaskedModel) -> None:
    for factors in masked.factors.values():
        factors.fill_(1.0)


def _prune_all_but_first(masked: MaskedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, layer in masked.layers.items():
        first = torch.arange(layer.num_structures, device=layer.mask.device) == 0
        masked.set_kept(name, first)
        # Before training all layers have one E[θ], which would hide where different ones cannot share a weight.
        masked.factors[name].mul_(0.5 + torch.rand((), generator=generator).item())
