"""How many parameters a network would have once compacted, for many masks, without making each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.compaction.cutting import cut, new_biases, shifts
from bmrs.compaction.folding import Folding
from bmrs.graph.analysis import analyse
from bmrs.graph.capture import capture, mark
from bmrs.graph.copies import evaluation_copy
from bmrs.graph.emptied import emptied_layers
from bmrs.graph.inputs import as_inputs
from bmrs.noise.lookup import noise_layers, required_noise_layers


class CompactedSizes:
    """Sizes of what `compact` would make of a model, as its masks change.

    Args:
        model: a model that `compact` takes; its masks are looked at whenever a size is asked for.
        example_inputs: as for `compact`.

    Raises:
        TypeError, ValueError: as `compact`.
    """

    def __init__(self, model: nn.Module, example_inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> None:
        self._layers = required_noise_layers(model)
        with torch.inference_mode(False), torch.no_grad():
            masked = evaluation_copy(model)
            self._factors = {name: self._kept(name).clone() for name in noise_layers(masked)}
            mark(masked, self._factors)
            self._captured = capture(masked, as_inputs(example_inputs, masked), "compact", dynamic="first")

    def parameters(self) -> int:
        """Return the number of trainable values of the compacted network, with the masks as they are now."""
        with torch.inference_mode(False), torch.no_grad():
            for name, factors in self._factors.items():
                factors.copy_(self._kept(name))
            analysis = analyse(self._captured)
            emptied = emptied_layers(analysis)
            found = shifts(analysis, emptied)
            names = new_biases(analysis, found)
            the_cut = cut(analysis, Folding([], {}), found, names, emptied)
        tensors, gone = the_cut.tensors, the_cut.gone
        trained = (
            x for x in self._captured.model.named_parameters() if x[1].requires_grad and x[0] not in gone
        )
        own = dict(trained)
        return sum({**own, **tensors}[name].numel() for name in {*own, *names.values()})

    def _kept(self, name: str) -> Tensor:
        layer = self._layers[name]
        return layer.spread(layer.kept.to(layer.mu.dtype))
