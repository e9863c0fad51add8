"""`compact`: from a masked model to a smaller one, checked before it is returned."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.checks import check_choice, check_integer, check_number
from bmrs.compaction.approximate_norms import ApproximateNorms
from bmrs.compaction.comparison import OutputComparison, all_finite
from bmrs.compaction.flop_count import forward_flops
from bmrs.compaction.forms import Form, find_form
from bmrs.compaction.masked_model import MaskedModel, factors_of, inside_a_module
from bmrs.compaction.record import Record, joined, record_of, remember
from bmrs.compaction.refit import refit
from bmrs.compaction.report import CompactReport
from bmrs.compaction.reporting import (
    approximated_norms,
    layer_report,
    number_of_bytes,
    number_of_values,
    unused_buffers,
    unused_parameters,
)
from bmrs.compaction.rounding import structures_to_give_back
from bmrs.compaction.surgery import replace_noise
from bmrs.compaction.training_only import failure_in_training, only_in_training
from bmrs.graph.analysis import DIVIDED, Analysis
from bmrs.graph.capture import has_autocast, mark
from bmrs.graph.copies import copied, evaluation_copy
from bmrs.graph.inputs import as_inputs, map_tensors
from bmrs.graph.layer_norms import check_approximate
from bmrs.noise.hooks import check_noise_acts
from bmrs.noise.lookup import noise_layers


def compact(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    expected_noise: bool = True,
    refit_to: nn.Module | None = None,
    refit_ridge: float | None = None,
    round_to: int = 1,
    keep_noise: bool = False,
    approximate: Collection[str] = (),
) -> nn.Module:
    """Return the network that a masked model is in evaluation mode, without pruned structures and, by default, noise.

    The model is captured with torch.export, and channels are followed through its operators: what belongs together is
    found from the graph, not from a list of layers. A pruned structure is removed from the layer that makes it, from
    what lies behind, and from the input of all that read it. What it still contributes as a constant, through the bias
    of a batch norm behind it, moves into the biases of these. The expected noise of the structures that stay is folded
    into the parameters around it, in float64.

    A pruned structure stays, with zero weights, where removal would not be exact: where it is an output of the model;
    where a branch that is added to it keeps its channel (`bmrs.prune` with ``example_inputs`` decides on such channels
    together); where zero padding makes its constant differ from place to place; where it is counted in the statistics
    of a LayerNorm (unless ``approximate`` lets it leave), in a softmax or in a mean over channels; where sizes would
    not agree, as the widths of attention heads; where an operator is not known. `compact_report` says so, with the
    reason. Noise that no parameter can take up becomes one multiplication by fixed factors. Of a residual branch of
    which all structures are pruned, layers without weights stay, which add what the branch adds.

    Args:
        model: any model that torch.export can capture, in any mode, also inside `torch.compile` or
            DistributedDataParallel; it is left as it is.
        example_inputs: its input, a sequence of its positional arguments, or a mapping of its keyword arguments; real
            examples, in the model's dtype and on its device. With ``refit_to`` some thousand training examples.
        expected_noise: False multiplies the structures that stay by 1 instead of E[θ], so that weights that were
            trained without noise, as before `bmrs.learn_posteriors`, come out as they are: a better start for
            fine-tuning. The outputs are then compared with those of the masked model with θ = 1.
        refit_to: the network that was pruned, as it was trained, with layers of the same names: a copy made before
            `bmrs.add_noise`, or the dense network whose weights the model has. It is left as it is. Each linear and
            convolution layer then gets the weights with which its outputs on ``example_inputs`` are closest to those
            of the full network, by least squares. That takes no training and no labels. Transposed convolutions,
            recurrent layers, weights that are a table of an embedding too, and the projections that torch's attention
            makes of its input keep theirs; other layers that cannot be refitted are named in a warning.
        refit_ridge: how much the weights that a layer has count in ``refit_to``, relative to the mean variance of its
            inputs; greater than 0. None is right where no weight is trained afterwards: for each layer that which
            serves examples best that were left out, every fifth one, or 1e-3 where there are fewer than 20. Where
            weights are trained, 0.3 was better: what little can be told from the structures that are left stays near
            what was learned.
        round_to: gives pruned structures back, those with the most evidence for them, until the numbers that stay are
            multiples of this one, which hardware may be faster with; or all of them where there are fewer. That is for
            structures that lie along one dimension of a value, such as all of linear and convolution layers. The
            outputs are then compared with those of the masked model without their masks.
        keep_noise: True leaves the noise layers where they are, with the posteriors of the structures that stay, so
            that `bmrs.predict` can draw them and learning can go on. Nothing is folded; outputs in evaluation mode are
            as without it.
        approximate: names of what may be approximated so that more can leave, of which there is one: ``"layer_norm"``.
            A pruned channel that is constant where a LayerNorm counts it, such as one of the residual stream of which
            every part is pruned, then leaves it, and with it the stream. The layer takes its statistics over the
            channels that stay; its weight, bias and ε make up for the others as well as they can on ``example_inputs``
            (`bmrs.graph.layer_norms` has the formulas). The outputs then differ from the masked model's, and
            `compact_report` says by how much. Nothing changes where nothing leaves through such a layer.

    Returns:
        A copy of the model with narrower layers: its own classes, names, hooks, shared weights, frozen parameters,
        dtypes and memory formats. Where the model's own code has sizes in it that cannot be narrower, a
        ``torch.fx.GraphModule`` of its operators instead. It is in evaluation mode. Before refitting, its outputs
        equal the masked model's, both computed in float64 from the stored numbers: within 1e-9 of the largest for a
        float64 model, 1e-4 for a float32 one and 16 units of rounding for 16-bit ones and for autocast in the model's
        own code. That is checked on the example. (A model that casts to a dtype of its own choice is compared as it
        is.) With ``approximate`` they equal, as closely, those of the masked model with these layers approximated.

    Raises:
        TypeError: ``model`` is not a module, ``example_inputs`` hold no tensor, or an option is of the wrong type.
        ValueError: the model does not run on the example or cannot be captured, has NaN parameters or such on the meta
            device, is sharded, or ``refit_to`` is another network; the place is named. ``keep_noise`` is given with
            ``expected_noise=False``, or noise would multiply a constant that only a bias can take up. ``approximate``
            names what there is not.
        RuntimeError: the outputs differ on the example.
    """
    if refit_ridge is not None:
        check_number("refit_ridge", refit_ridge, above=0.0)
        if refit_to is None:
            raise ValueError("refit_ridge goes with refit_to, the network that weights are refitted to")
    check_integer("round_to", round_to, minimum=1)
    check_choice("keep_noise", keep_noise, (False, True))
    if keep_noise and not expected_noise:
        raise ValueError(
            "keep_noise=True keeps the noise that expected_noise=False would replace by 1: give one of the two"
        )
    with torch.inference_mode(False), torch.no_grad():
        inputs = as_inputs(example_inputs, model)
        masked = MaskedModel(
            model,
            inputs,
            expected_noise=expected_noise,
            few_examples=refit_to is not None,
            approximate=check_approximate(approximate),
        )
        given_back: Counter[str] = Counter()
        # Noise that stays cannot multiply what a bias would stand in for.
        analysis = masked.analysis(follow_constants=not keep_noise)
        while round_to > 1 and (structures := structures_to_give_back(analysis, masked.layers, round_to)):
            for name, chosen in structures.items():
                mask = masked.layers[name].mask
                masked.set_kept(name, mask.index_fill(0, torch.as_tensor(chosen, device=mask.device), True))
                given_back[name] += len(chosen)
            analysis = masked.analysis(follow_constants=not keep_noise)
        result = compacted(masked, analysis, given_back=given_back, keep_noise=keep_noise)
        if refit_to is not None:
            reference = evaluation_copy(refit_to)
            refit(result, analysis, reference, inputs, ridge=refit_ridge)
    report = compact_report(result)
    if (
        not masked.layers
        and report.parameters_after == report.parameters_before
        and record_of(masked.model) is None
    ):
        warnings.warn(
            f"the model ({type(masked.model).__name__}) has no noise layer, so that nothing of it is pruned and "
            "nothing leaves. If what it was loaded from has some, which load_state_dict(strict=False) passes over, "
            "call bmrs.add_noise as for training before loading",
            stacklevel=2,
        )
    return result


def compact_report(compacted: nn.Module) -> CompactReport:
    """Return what `compact` did to make a network.

    Raises:
        TypeError: the network is not one that `compact` returned, or a copy of one.
    """
    record = record_of(compacted)
    if record is None:
        raise TypeError(
            f"compact_report needs a network that bmrs.compact returned, got {type(compacted).__name__}"
        )
    return record.report


def fold(model: nn.Module) -> nn.Module:
    """Return the network that a masked model is in evaluation mode, without noise layers, at its full size.

    Every noise layer becomes one multiplication by its expected noise times its mask. That works for any model, so that
    what `compact` cannot take can be exported and saved all the same.

    Args:
        model: any model, in any mode, with or without noise layers; it is left as it is.

    Returns:
        A copy of the model, with its own classes and names, in evaluation mode.

    Raises:
        TypeError, ValueError: ``model`` is not a module, is sharded, or has parameters on the meta device.
    """
    with torch.inference_mode(False), torch.no_grad():
        masked = inside_a_module(evaluation_copy(model))
        check_noise_acts(masked)
        layers = noise_layers(masked)
        mark(masked, {name: factors_of(layer, expected_noise=True) for name, layer in layers.items()})
        result = copied(masked, share=False)
        replace_noise(result, dict.fromkeys(layers, "asked for"))
    return result.eval()


def compacted(
    subject: MaskedModel,
    analysis: Analysis,
    *,
    given_back: Mapping[str, int] = MappingProxyType({}),
    keep_noise: bool = False,
) -> nn.Module:
    """Return the smaller network of a model with its masks as they are.

    Args:
        subject: the model.
        analysis: of its graph, with these masks.
        given_back: structures that were pruned before the masks were changed, by name of the noise layer.
        keep_noise: as for `compact`.

    Raises:
        ValueError, RuntimeError: as `compact`.
    """
    masked, layers, inputs = subject.model, subject.layers, subject.examples
    comparison = OutputComparison(
        masked,
        inputs,
        autocast=has_autocast(analysis.captured.graph),
        approximation=ApproximateNorms(analysis) if analysis.fits else None,
    )
    for layer in layers.values() if keep_noise else ():
        comparison.allow(layer.mu.dtype)  # of which E[θ] was rounded to
    form = find_form(subject, analysis, comparison, keep_noise=keep_noise)
    analysis, emptied, the_cut, result = form.analysis, form.emptied, form.the_cut, form.network
    assert result is not None
    _check_stored(result)
    unused = unused_parameters(analysis)
    idle = (*unused, *unused_buffers(analysis)) if form.kind == "module" else ()
    report = CompactReport(
        form=form.kind,
        form_because=form.because if form.kind == "graph" else "",
        layers=tuple(
            layer_report(analysis, emptied, form.folding, name, layer, given_back.get(name, 0), form.noise)
            for name, layer in layers.items()
        ),
        parameters_before=number_of_values(masked),
        parameters_after=number_of_values(result),
        bytes_before=number_of_bytes(masked),
        bytes_after=number_of_bytes(result),
        unused=unused,
        emptied=tuple(n for n, _ in masked.named_modules() if n in the_cut.constant or n in the_cut.passing),
        flops_before=subject.flops,
        flops_after=forward_flops(result, inputs),
        error=form.error,
        compared_in=form.compared_in,
        approximated=approximated_norms(analysis, emptied, comparison, masked, result),
        only_in_training=only_in_training(masked, subject.few) if form.kind == "graph" else (),
        fails_in_training=failure_in_training(masked, result, subject.few) if idle else "",
    )
    if form.is_doubtful:
        warnings.warn(
            f"the compacted network's outputs differ by {form.error:.2g} of the largest from the masked model's: that "
            f"is within the tolerance of {comparison.tolerance:g}, but more than rounding makes, as where the code of "
            f"{type(masked).__name__} computes with the size of a layer: compare the two on inputs of your own. If "
            "the code reads a width, as x * layer.out_features, write the number there instead",
            stacklevel=3,
        )
    if form.keeps:
        _warn_of_what_stays(form, report, type(masked).__name__)
    if report.fails_in_training:
        warnings.warn(
            f"in training mode the compacted network ends in {report.fails_in_training}. Evaluation mode does not use "
            f"{', '.join(idle)}, whose sizes stay while what they meet became smaller: replace these parts, or train "
            "the masked model to its end and compact it then",
            stacklevel=3,
        )
    if report.only_in_training:
        warnings.warn(
            f"the compacted network is a graph of what {type(masked).__name__} does in evaluation mode; in training "
            f"mode it lacks {'; '.join(report.only_in_training)}",
            stacklevel=3,
        )
    selections = {name: s for name, s in the_cut.selections.items() if s.axes or s.columns is not None}
    fixed = analysis.captured.fixed_number()
    if fixed is not None and form.kind == "graph":
        warnings.warn(
            f"the compacted network takes {fixed} along the first dimension of its inputs and no other number: the "
            f"code of {type(masked).__name__}, or torch.export of it, makes a plain number of that size, as "
            "len(x) does and x.shape[0] does not, or divides it into parts of a given size, as x.split(8) does",
            stacklevel=3,
        )
    kept_inputs = map_tensors(lambda t: t.detach().clone(), inputs if fixed is not None else subject.few)
    own_code: tuple[dict[str, dict[str, Any]], ...] = ()
    if form.kind == "module":
        before = record_of(masked) or Record(report, kept_inputs)
        own_code = (joined(before.code_sizes, form.sizes), joined(before.numbers, the_cut.numbers))
    remember(result, Record(report, kept_inputs, selections, *own_code))
    return result


def _warn_of_what_stays(form: Form, report: CompactReport, name: str) -> None:
    """Warn that the model's own code keeps pruned structures, which budgets do not know of."""
    stay = sum(
        number
        for layer in report.layers
        for reason, number in layer.kept_because.items()
        if reason.startswith(DIVIDED)
    )
    if form.keeps == "parts":
        why = (
            f"the code of {name} divides their dimension into equal parts, of which each has to keep as many; "
            "bmrs.prune_to takes as many of each"
        )
    else:
        why = (
            f"the code of {name} divides dimensions by numbers of its own, so that they cannot be smaller "
            f"({form.because}), and a graph of its operators is no way out; budgets reckoned without that are missed"
        )
    warnings.warn(
        f"{stay} of {report.pruned} pruned structures stay, with zero weights, as {why}. compact_report names them",
        stacklevel=4,
    )


def _check_stored(model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if not all_finite(tensor):
            raise RuntimeError(f"parameter {name!r} of the compacted model is not finite in {tensor.dtype}")
