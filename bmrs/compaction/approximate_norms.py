"""Layer norms of a masked network as it runs: their statistics, and how it runs if they count the channels that stay.

`bmrs.graph.layer_norms` has the formulas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bmrs.compaction.comparison import outputs
from bmrs.graph.analysis import Analysis
from bmrs.graph.capture import Captured, Moments
from bmrs.graph.inputs import Inputs
from bmrs.graph.layer_norms import Fit, LayerNorm


@dataclass(frozen=True)
class _Left:
    """What is left of a layer norm: how it was, which channels of how many, int64, and its new ε."""

    norm: LayerNorm
    kept: Tensor
    channels: int

    @property
    def eps(self) -> float:
        return self.norm.eps * self.channels / len(self.kept)


class _LayerNorms(TorchFunctionMode):
    """Looks at the layer norms of a network that are of some weights, each of them known by its name.

    Args:
        names: of weights, by their identity.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.layer_norm, torch.layer_norm):
            return func(*args, **kwargs)
        given = {
            **dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)),
            **kwargs,
        }
        result = func(*args, **kwargs)  # whatever becomes of it, as dtypes that it refuses are to be refused
        name = self.names.get(id(given.get("weight")))
        replaced = None if name is None else self.look(name, given["input"], given)
        return result if replaced is None else replaced.to(result.dtype)

    def look(self, name: str, x: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """Take note of what a layer norm is given, and return what is to be its output, None for its own."""
        raise NotImplementedError


class _Statistics(_LayerNorms):
    """Adds up what `Moments` and `Fit` are means of."""

    def __init__(self, names: Mapping[int, str], left: Mapping[str, _Left]) -> None:
        super().__init__(names)
        self.left = left
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(6, dtype=torch.float64))

    def look(self, name: str, x: Tensor, given: Mapping[str, Any]) -> None:
        """Add up the statistics of what a layer norm takes."""
        x = x.double()
        mean, deviation = x.mean(-1), (x.var(-1, correction=0) + given.get("eps", 1e-5)).sqrt()
        found = [torch.ones_like(mean), mean / deviation, 1 / deviation]
        if (left := self.left.get(name)) is not None:
            staying = x[..., left.kept.to(x.device)]
            variance = staying.var(-1, correction=0)
            own = (variance + left.eps).sqrt()
            found += [(staying.mean(-1) - mean) / deviation, variance / (deviation * own), variance / own**2]
        sums = torch.stack([value.sum() for value in found]).cpu()
        self.sums[name][: len(sums)] += sums


class ApproximateNorms(_LayerNorms):
    """Has a masked network of full size run as if its layer norms counted the channels that stay, and no others.

    That is what the smaller network has to compute, exactly.

    Args:
        analysis: of the network, with its fits.
    """

    def __init__(self, analysis: Analysis) -> None:
        super().__init__(_names(analysis.captured))
        self._left, self._fits = _left(analysis), analysis.fits

    def look(self, name: str, x: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """Return the output of a layer norm that channels leave."""
        if (left := self._left.get(name)) is None:
            return None
        norm, fit, kept = left.norm, self._fits[name], left.kept.to(x.device)
        weight, bias = given["weight"].to(x.dtype), given.get("bias")
        zeros = torch.zeros_like(x)
        # Elsewhere is what nothing reads, but for constants.
        normalised = zeros if norm.dropped else norm.moments.normalised(x)
        own = F.layer_norm(x[..., kept], (len(kept),), eps=left.eps) * fit.gain
        normalised = normalised.index_copy(-1, kept, own + (fit.shift if bias is not None else 0.0))
        result = normalised * weight if bias is None else normalised * weight + bias.to(x.dtype)
        gone = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device).index_fill(0, kept, value=False)
        return result.masked_fill(gone, 0.0) if norm.dropped else result


def moments(model: nn.Module, captured: Captured, inputs: Inputs) -> dict[str, Moments]:
    """Return the statistics of a network's layer norms on examples, by the name of the weight."""
    sums = _measured(model, _Statistics(_names(captured), {}), inputs)
    return {name: Moments(float(s[1] / s[0]), float(s[2] / s[0])) for name, s in sums.items()}


def fits(model: nn.Module, analysis: Analysis, inputs: Inputs) -> dict[str, Fit]:
    """Return what makes up for the channels that leave layer norms, by the name of the weight.

    Args:
        model: the masked network of full size.
        analysis: of it.
        inputs: examples.
    """
    left = _left(analysis)
    if not left:
        return {}
    sums = _measured(model, _Statistics(_names(analysis.captured), left), inputs)
    found = {}
    for name, its_left in left.items():
        number, _, _, shift, product, square = sums[name].tolist()
        gain = product / square if square else (its_left.channels / len(its_left.kept)) ** 0.5
        found[name] = Fit(gain, shift / number)
    return found


def _names(captured: Captured) -> dict[int, str]:
    return {id(captured.tensors[place]): name for place, name in captured.names.items()}


def _left(analysis: Analysis) -> dict[str, _Left]:
    """Return what is left of the layer norms that channels leave, by the name of the weight."""
    found = {}
    for node, norm in analysis.approximated().items():
        x = analysis.calls[node]["input"]
        kept = analysis.kept(x, -1)
        assert kept is not None
        found[norm.weight] = _Left(norm, kept, x.shape[-1])
    return found


def _measured(model: nn.Module, statistics: _Statistics, inputs: Inputs) -> Mapping[str, Tensor]:
    try:
        outputs(model, inputs, double=True, mode=statistics)
    except Exception:  # It casts to a dtype of its own choice.
        statistics.sums.clear()
        outputs(model, inputs, double=False, mode=statistics)
    return statistics.sums
