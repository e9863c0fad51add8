"""The graph of what a model does in evaluation mode, as torch.export sees it, with noise layers marked."""

from __future__ import annotations

import copy
import inspect
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_flatten, tree_map

from bmrs.noise_layer import ChannelScale, NoiseLayer, noise_layers

Inputs: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"


@torch.library.custom_op("bmrs::mark_noise", mutates_args=())
def mark_noise(x: Tensor, factors: Tensor, dim: int, name: str, structure_size: int) -> Tensor:
    """Return x · factors along a dimension, in a form that stays recognisable in a graph."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return x * factors.to(x.dtype).view(shape)


@mark_noise.register_fake
def _(x: Tensor, factors: Tensor, dim: int, name: str, structure_size: int) -> Tensor:
    return torch.empty_like(x)


class MarkedNoise(ChannelScale):
    """A noise layer in evaluation mode, as a single marked operation.

    Args:
        layer: the noise layer.
        name: its qualified name.
        factors: what multiplies the entries along its dimension.
    """

    def __init__(self, layer: NoiseLayer, name: str, factors: Tensor) -> None:
        super().__init__(factors, dim=layer.dim, activation=layer.activation)
        self.name, self.structure_size = name, layer.structure_size

    def scaled(self, x: Tensor) -> Tensor:
        """Return x · factors."""
        result: Tensor = mark_noise(x, self.factors, self.dim, self.name, self.structure_size)
        return result


@dataclass(frozen=True)
class Captured:
    """A model and its graph.

    Attributes:
        model: a copy in evaluation mode, which shares parameters and buffers with the original; noise layers are
            `MarkedNoise`.
        program: its graph.
        tensors: by the name of a placeholder of the graph, the parameter, buffer or constant that it stands for.
        names: by the name of a placeholder, the qualified name of the parameter or buffer.
    """

    model: nn.Module
    program: ExportedProgram
    tensors: dict[str, Tensor]
    names: dict[str, str]

    @property
    def graph(self) -> fx.Graph:
        """The graph of operators."""
        return self.program.graph


def as_inputs(example_inputs: Any, model: nn.Module | None = None) -> Inputs:
    """Positional and keyword arguments of a forward pass, from what users give.

    Args:
        example_inputs: one tensor, a sequence of positional arguments, or a mapping of keyword arguments; or a mapping
            that is itself the only argument of the model.
        model: the model.

    Raises:
        TypeError: anything else, or no tensor in it.
        ValueError: a tensor is empty.
    """
    if isinstance(example_inputs, Tensor):
        inputs: Inputs = ((example_inputs,), {})
    elif isinstance(example_inputs, Mapping):
        inputs = _mapped_inputs(dict(example_inputs), model)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        inputs = (tuple(example_inputs), {})
    else:
        raise TypeError(
            "example_inputs must be a tensor, a sequence of positional arguments or a mapping of keyword arguments, "
            f"was {type(example_inputs).__name__}"
        )
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(f"example_inputs must hold a tensor, was {example_inputs!r}")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ValueError(f"example_inputs must hold an example, was of shape {tuple(tensor.shape)}")
    return inputs


def _mapped_inputs(mapping: dict[str, Any], model: nn.Module | None) -> Inputs:
    if model is not None:
        parameters = list(inspect.signature(unwrapped(model).forward).parameters.values())
        named = {p.name for p in parameters}
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not any_name and not named.issuperset(mapping) and len(parameters) == 1:
            return (mapping,), {}
    return (), mapping


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Inputs with a function applied to each tensor."""
    mapped: Inputs = tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, inputs)
    return mapped


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DistributedDataParallel and the like.

    Raises:
        TypeError: it is not a module.
        ValueError: its parameters are sharded, so that it has to be gathered first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, was {model!r}")
    while True:
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "FullyShardedDataParallel" in type(model).__name__ or _is_sharded(model):
            raise ValueError(
                f"the parameters of the model ({type(model).__name__}) are sharded: gather a full state_dict and load "
                "it into an unsharded copy of the model first"
            )
        else:
            return model


def _is_sharded(model: nn.Module) -> bool:
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


def copied(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of a model.

    Args:
        model: any module, also one of which a layer holds a computed tensor, which `copy.deepcopy` refuses.
        share: whether parameters and buffers are shared with the original.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for holder in (module.__dict__, module._buffers, module._parameters):
            for tensor in holder.values():
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_inference():
            # Such a tensor can neither be trained nor traced.
            clone = tensor.clone()
            trained = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(clone, requires_grad=tensor.requires_grad) if trained else clone
        elif share:
            memo[id(tensor)] = tensor
    try:
        copy_of_model = copy.deepcopy(model, dict(memo))
    except Exception:
        copy_of_model = copy.deepcopy(model, {**memo, **_what_cannot_be_copied(model, memo)})
    _remove_wrappers(copy_of_model)
    return unwrapped(copy_of_model)


def _what_cannot_be_copied(model: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Attributes of modules that a copy has to share, such as locks, open files and tensors of an old computation."""
    shared = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, nn.Module | Tensor) or value is None:
                continue
            try:
                copy.deepcopy(value, {**memo, **{id(m): m for m in model.modules()}})
            except Exception:
                shared[id(value)] = value
    return shared


def _check_forwards(model: nn.Module) -> None:
    """Refuse a forward that was replaced by one that holds the module: its copy would compute with the original."""
    modules = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        own = isinstance(forward, types.MethodType) and forward.__self__ is module
        if forward is not None and not own and _holds(forward, modules, depth=4):
            raise ValueError(
                f"the forward of layer {name!r} ({type(module).__name__}) was replaced by {forward!r}, which holds the "
                "module, so that a copy would compute with the original: set the class's own forward back first "
                "(del layer.forward)"
            )


def _holds(value: Any, modules: set[int], depth: int) -> bool:
    """Whether a function refers to one of some modules."""
    if depth == 0 or value is None:
        return False
    if id(value) in modules:
        return True
    inside: list[Any] = []
    for attribute in ("__self__", "__func__", "__wrapped__", "func", "_torchdynamo_orig_callable"):
        inside.append(getattr(value, attribute, None))
    inside += [*getattr(value, "args", ()), *(getattr(value, "keywords", None) or {}).values()]
    inside += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _is_filled(cell)]
    return any(_holds(item, modules, depth - 1) for item in inside)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _remove_wrappers(model: nn.Module) -> None:
    for module in list(model.modules()):
        module._compiled_call_impl = None
        for name, child in list(module._modules.items()):
            if isinstance(child, torch._dynamo.eval_frame.OptimizedModule):
                module._modules[name] = unwrapped(child)


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares its tensors, with weights as layers use them.

    Parametrizations and the older hooks, such as those of weight normalisation, are replaced by the weights that they
    compute.

    Raises:
        TypeError, ValueError: see `unwrapped`; or a tensor is on the meta device, or a forward was replaced by one that
            holds the original.
    """
    model = unwrapped(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values: load the weights first")
    _check_forwards(model)
    result = copied(model, share=not _computes_weights(model)).eval()
    for module in result.modules():
        materialise_weights(module)
    return result


def _computes_weights(model: nn.Module) -> bool:
    return any(parametrize.is_parametrized(m) or _weight_hooks(m) for m in model.modules())


def _weight_hooks(module: nn.Module) -> list[Any]:
    kinds = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]


def materialise_weights(module: nn.Module) -> None:
    """Replace what computes weights of a layer, such as weight normalisation, by the weights, in place."""
    if parametrize.is_parametrized(module):
        _remove_parametrizations(module)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            hook.remove(module)
            del module._forward_pre_hooks[key]
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


def _remove_parametrizations(module: nn.Module) -> None:
    """Like torch's function, which would change the class of the original too, since a copy has the same one."""
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    values = {name: getattr(module, name).detach().clone() for name in parametrizations}
    trained = {name: any(p.requires_grad for p in its.parameters()) for name, its in parametrizations.items()}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=trained[name]))


def mark(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Replace a model's noise layers by `MarkedNoise`, in place.

    Args:
        model: the model.
        factors: by qualified name of the noise layer, its factors in evaluation mode.

    Raises:
        ValueError: a noise layer does something else than `NoiseLayer`.
    """
    for name, layer in noise_layers(model).items():
        changed = type(layer).forward is not NoiseLayer.forward or "forward" in vars(layer)
        if changed or layer._forward_hooks or layer._forward_pre_hooks:
            raise ValueError(
                f"noise layer {name!r} ({type(layer).__name__}) has a forward or hooks of its own, which would be "
                "lost: put what they do into a layer beside it"
            )
    replacements = {
        layer: MarkedNoise(layer, name, factors[name]).eval() for name, layer in noise_layers(model).items()
    }
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, NoiseLayer):
                module._modules[name] = replacements[child]


def capture(
    model: nn.Module, inputs: Inputs, purpose: str, *, dynamic: Literal["none", "first", "sequences"] = "none"
) -> Captured:
    """Capture what a model in evaluation mode does.

    Args:
        model: the model; its hooks are a part of what it does.
        inputs: an example.
        purpose: who asks, for errors.
        dynamic: which sizes of the inputs may be other ones later, where the model allows it: none, those of the first
            dimensions, as the number of examples, or lengths of sequences too.

    Raises:
        ValueError: the model does not run on the example, or cannot be captured.
    """
    attempts: list[tuple[Inputs, Any]] = [(inputs, None)]
    if dynamic != "none":
        several = _several_examples(inputs)
        attempts.insert(0, (several, _first_dimensions))
        if dynamic == "sequences":
            attempts.insert(0, (several, _dimensions_of_sequences))
    failure: Exception | None = None
    for example, dimensions in attempts:
        args, kwargs = example
        try:
            shapes = None if dimensions is None else _shapes_by_name(model, tree_map(dimensions, example))
            # A copy: what a forward keeps in attributes would be symbols.
            exported = copied(model, share=True)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(exported, args, kwargs, dynamic_shapes=shapes, strict=False)
            return _captured(model, program)
        except Exception as error:
            failure = error
    raise ValueError(_why_not(model, inputs, purpose, failure)) from failure


def has_autocast(graph: fx.Graph) -> bool:
    """True if a part of a graph runs under torch.autocast."""
    calls = [n for n in graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    return any("autocast" in node.name and len(node.args) > 2 and node.args[2] is True for node in calls)


def _captured(model: nn.Module, program: ExportedProgram) -> Captured:
    signature = program.graph_signature
    own_inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    # What nobody reads goes, unless it has weights: the model's code calls these layers all the same.
    program.graph.eliminate_dead_code(
        is_impure_node=lambda node: (
            node.is_impure() or any(n.name in own_inputs for n in node.all_input_nodes)
        )
    )
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    own = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    tensors = {placeholder: own[name] for placeholder, name in names.items() if name in own}
    for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
        constant = program.constants[name]
        assert isinstance(constant, Tensor)
        tensors[placeholder] = constant
    return Captured(model, program, tensors, {p: n for p, n in names.items() if n in own})


def _dimensions_of_sequences(leaf: Any) -> Any:
    # Symbolic sizes of images make torch.export take minutes for networks that divide them into windows.
    small = isinstance(leaf, Tensor) and leaf.dim() <= 3
    return dict.fromkeys(range(leaf.dim()), Dim.AUTO) if small else _first_dimensions(leaf)


def _first_dimensions(leaf: Any) -> Any:
    return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None


def _several_examples(inputs: Inputs) -> Inputs:
    """A batch of two of a batch of one: torch.export takes a size of 1 for one that never changes."""
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.dim()]
    if any(tensor.shape[0] != 1 for tensor in tensors):
        return inputs
    return map_tensors(lambda t: torch.cat([t, t]) if t.dim() else t, inputs)


def _shapes_by_name(model: nn.Module, shapes: Any) -> Any:
    """Dynamic shapes in the form that torch.export takes: positional ones and named ones in one tree."""
    args, kwargs = shapes
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def does_not_run(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    """Say that a model does not run on an example."""
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    examples = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
    return (
        f"the model ({type(model).__name__}) does not run on example_inputs of {examples}: {_in_short(error)}"
    )


def _why_not(model: nn.Module, inputs: Inputs, purpose: str, failure: Exception | None) -> str:
    try:
        with torch.no_grad():
            args, kwargs = map_tensors(torch.clone, inputs)
            model(*args, **kwargs)
    except Exception as error:
        return does_not_run(model, inputs, error)
    return (
        f"{purpose} follows the model with torch.export, which failed on {type(model).__name__}{_line_of(failure)}: "
        f"{_in_short(failure)}. Without removing anything, bmrs.fold(model) makes a network without noise layers"
    )


def _in_short(error: Exception | None) -> str:
    text = str(error).strip()
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}"


def _line_of(error: Exception | None) -> str:
    """The last line of the user's own code that an error passed, as a part of a sentence."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    own = [
        f for f in frames if "/torch/" not in f.filename and "bmrs" not in f.filename and f.name == "forward"
    ]
    return f" at line {own[-1].lineno} of {own[-1].filename} ({own[-1].line})" if own else ""
