"""A masked model made ready for compaction: copied, checked and captured once, whatever masks are then tried."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from bmrs.compaction.approximate_norms import fits, moments
from bmrs.compaction.comparison import all_finite, cut_examples
from bmrs.compaction.flop_count import forward_flops
from bmrs.graph.analysis import Analysis, analyse
from bmrs.graph.capture import capture, does_not_run, mark, refuse_quantised
from bmrs.graph.copies import evaluation_copy, refusing_noise_of
from bmrs.graph.inputs import Inputs
from bmrs.noise.hooks import check_noise_acts
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


class MaskedModel:
    """A copy of a model in evaluation mode and its graph, whose masks can be changed.

    Args:
        model: as for `bmrs.compact`; it is left as it is.
        inputs: an example.
        expected_noise: whether structures that stay are multiplied by E[θ] instead of 1.
        few_examples: whether a few of the examples are enough, where the model allows that.
        approximate: names of what may be approximated.

    Attributes:
        model: the copy, with `MarkedNoise` in place of noise layers.
        layers: the noise layers by qualified name; their masks are changed by `set_kept` alone.
        factors: by the same names, what multiplies the entries along the layer's dimension.
        few: the first two examples, where the others do not matter to them; otherwise all.
        examples: what was captured.
        flops: floating-point operations of a forward pass of these.
        captured: the graph, with the number of examples as a symbol.

    Raises:
        TypeError, ValueError: as `bmrs.compact`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        expected_noise: bool = True,
        few_examples: bool = False,
        approximate: frozenset[str] = frozenset(),
    ) -> None:
        self._expected_noise = expected_noise
        self.model = inside_a_module(evaluation_copy(model))
        check_noise_acts(self.model)
        self.layers = noise_layers(self.model)
        for name, layer in self.layers.items():
            layer.settle(name)
        refuse_quantised(self.model, "compact")
        _check_finite(self.model)
        self.factors = {
            name: factors_of(layer, expected_noise=expected_noise) for name, layer in self.layers.items()
        }
        mark(self.model, self.factors)
        with refusing_noise_of(model):
            flops = _flops_where_it_runs(self.model, inputs)
        self.few = cut_examples(self.model, inputs)
        self.examples = self.few if few_examples else inputs
        self.flops = flops if self.examples is inputs else forward_flops(self.model, self.examples)
        self.captured = capture(
            self.model, self.examples, "compact", dynamic="first", approximate=approximate
        )

    def analysis(self, *, follow_constants: bool = True) -> Analysis:
        """Return what leaves with the masks as they are; nothing is approximated where nothing leaves through it.

        Args:
            follow_constants: see `bmrs.graph.values.Findings`.
        """
        captured = self.captured
        if captured.approximate:
            known = replace(captured, moments=moments(self.model, captured, self.examples))
            analysis = analyse(known, follow_constants=follow_constants)
            if approximated := fits(self.model, analysis, self.examples):
                return replace(analysis, fits=approximated)
            captured = replace(captured, approximate=frozenset())
        return analyse(captured, follow_constants=follow_constants)

    def set_kept(self, name: str, kept: Tensor) -> None:
        """Change the mask of the copy's noise layer of a name to this one, bool of shape (num_structures,)."""
        layer = self.layers[name]
        # New buffers, as the copy shares those of the original.
        layer.mask, layer.pruned = layer.mask.clone(), layer.pruned.clone()
        layer.set_kept(kept)
        self.update_factors(name)

    def update_factors(self, name: str) -> None:
        """Make the factors of a noise layer those of its mask, after they were changed."""
        self.factors[name].copy_(factors_of(self.layers[name], expected_noise=self._expected_noise))


def inside_a_module(model: nn.Module) -> nn.Module:
    """Return a model in a container where it can be replaced, if it is itself a noise layer."""
    return nn.Sequential(model).eval() if isinstance(model, NoiseLayer) else model


def factors_of(layer: NoiseLayer, *, expected_noise: bool) -> Tensor:
    """Return what a noise layer multiplies the entries along its dimension by in evaluation mode."""
    factors = layer.expected_noise() if expected_noise else layer.kept.to(layer.mu.dtype)
    return layer.spread(factors).detach()


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise ValueError(f"parameter {name!r} is NaN or infinite; nothing was compacted")
    for name, buffer in model.named_buffers():
        if bool(buffer.isnan().any()):
            raise ValueError(f"buffer {name!r} is NaN; nothing was compacted")


def _flops_where_it_runs(model: nn.Module, inputs: Inputs) -> int:
    # For real, as tracing overlooks wrong dtypes; and so that what the model keeps from call to call is there.
    try:
        return forward_flops(model, inputs)
    except Exception as error:
        raise ValueError(does_not_run(model, inputs, error)) from error
