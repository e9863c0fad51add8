"""What torch.fx sees of a model: its layers and additions, and what produces each noise layer's input."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bmrs.compaction.stock_layers import DROPOUTS, WEIGHT_LAYERS, Addition, WeightLayer
from bmrs.noise_layer import NoiseLayer, added_noise

# Functions and methods whose arguments after x are those of the module's constructor.
_FUNCTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor] | str, ...]] = {
    nn.ReLU: (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    nn.LeakyReLU: (F.leaky_relu, F.leaky_relu_),
    nn.ReLU6: (F.relu6,),
    nn.Tanh: (torch.tanh, "tanh", "tanh_"),
    nn.Sigmoid: (torch.sigmoid, "sigmoid", "sigmoid_"),
    nn.ELU: (F.elu, F.elu_),
    nn.GELU: (F.gelu,),
    nn.SiLU: (F.silu,),
    nn.Hardswish: (F.hardswish,),
    nn.Hardtanh: (F.hardtanh,),
    nn.Softplus: (F.softplus,),
    nn.Softmax: (F.softmax, torch.softmax, "softmax"),
    nn.LogSoftmax: (F.log_softmax, torch.log_softmax, "log_softmax"),
    nn.MaxPool1d: (F.max_pool1d,),
    nn.MaxPool2d: (F.max_pool2d,),
    nn.MaxPool3d: (F.max_pool3d,),
    nn.AvgPool1d: (F.avg_pool1d,),
    nn.AvgPool2d: (F.avg_pool2d,),
    nn.AvgPool3d: (F.avg_pool3d,),
    nn.AdaptiveAvgPool1d: (F.adaptive_avg_pool1d,),
    nn.AdaptiveAvgPool2d: (F.adaptive_avg_pool2d,),
    nn.AdaptiveAvgPool3d: (F.adaptive_avg_pool3d,),
    nn.AdaptiveMaxPool1d: (F.adaptive_max_pool1d,),
    nn.AdaptiveMaxPool2d: (F.adaptive_max_pool2d,),
    nn.AdaptiveMaxPool3d: (F.adaptive_max_pool3d,),
}
_MODULE_OF_FUNCTION = {function: module for module, functions in _FUNCTIONS.items() for function in functions}
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
_RESHAPING_FUNCTIONS = (
    *(torch.flatten, torch.reshape, torch.squeeze),
    *("flatten", "view", "reshape", "squeeze", "contiguous"),
)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of a network; equal only to itself.

    Attributes:
        name: qualified name of the module, or of the function call in its module; calls can share one.
        module: the module, or for a function call the stock module that does the same.
        inputs: the steps whose results it takes, two for an addition and otherwise one; None stands for the
            model's input.
        input_shape: shape of each input on the example, batch dimension included.
        output_shape: shape of its output.
    """

    name: str
    module: nn.Module
    inputs: tuple[Step | None, ...]
    input_shape: torch.Size
    output_shape: torch.Size

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.module).__name__})"


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is; torch.fx would record a new tensor ``x + y``, and others read x too."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {}, name="add")


class _Tracer(fx.Tracer):
    """Records noise layers as single calls, those behind a layer's forward hook included."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NoiseLayer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        noise = added_noise(m)
        # Hooks of other modules run while these are traced through; those of a recorded call do not.
        if noise is not None and self.is_leaf_module(m, self.path_of_module(m)):
            return self.call_module(noise, noise.forward, (output,), {})
        return output


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor it computes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result


def _symbolic_trace(model: nn.Module, purpose: str) -> fx.GraphModule:
    # Inside a container, so that the model is itself called as a module, hooks included.
    root = nn.Sequential(model)
    try:
        graph = _Tracer().trace(root)
    except Exception as error:
        raise ValueError(
            f"{purpose} follows the model with torch.fx, which failed on {type(model).__name__}: {error}"
        ) from error
    return fx.GraphModule(root, graph)


def _qualified_name(node: fx.Node) -> str:
    """The module's name as the model's ``named_modules`` gives it; a call's own behind that of the module around."""
    if node.op == "call_module":
        return str(node.target).partition(".")[2]
    path, *_ = next(reversed(node.meta.get("nn_module_stack", {}).values()), ("",))
    around = path.partition(".")[2]
    call = re.sub(r"_\d+$", "", node.name)
    return f"{around}.{call}" if around else call


def producers(model: nn.Module, purpose: str) -> dict[NoiseLayer, WeightLayer]:
    """The linear or convolution layer whose output each noise layer scales, through other operations or not.

    Args:
        model: any model that torch.fx can trace.
        purpose: who asks, for errors.

    Returns:
        The producer of each noise layer that has a single one.
    """
    graph_module = _symbolic_trace(model, purpose)
    modules = dict(graph_module.named_modules())
    found: dict[NoiseLayer, WeightLayer] = {}
    for node in graph_module.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        while isinstance(layer, NoiseLayer):
            node = _only_source(node)
            if node is None:
                break
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, WEIGHT_LAYERS):
                found[layer] = module
                break
    return found


def single_input(example_inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """The one tensor that a model of one input takes.

    Raises:
        TypeError: there is none, or more than one.
        ValueError: it is empty.
    """
    inputs = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        names = ", ".join(type(value).__name__ for value in inputs)
        raise TypeError(
            f"example_inputs must be one tensor, as compact handles models of one input; got ({names})"
        )
    if inputs[0].numel() == 0:
        raise ValueError(f"example_inputs must hold an example, was of shape {tuple(inputs[0].shape)}")
    return inputs[0]


def trace(model: nn.Module, example: Tensor) -> list[Step]:
    """A model in evaluation mode as stock modules, additions and noise layers, in an order of execution.

    Identities, dropout functions, reshapings that change nothing and what the output does not depend on are
    left out; the last step gives the output. The fused activation of a noise layer becomes a step before it,
    with the same name. What reads a tensor after it was changed in place takes the changed one as its input.

    Args:
        model: model in evaluation mode.
        example: its input, at least one example.

    Raises:
        ValueError: torch.fx cannot trace the model, it does not run on the example, it takes or gives
            anything but one tensor, or it calls what no stock module here does.
    """
    graph_module = _symbolic_trace(model, "compact")
    recorder = _ShapeRecorder(graph_module)
    try:
        with torch.no_grad():
            recorder.run(example.clone())
    except Exception as error:
        raise ValueError(
            f"the model does not run on example_inputs of shape {tuple(example.shape)} and {example.dtype}: {error}"
        ) from error
    modules = dict(graph_module.named_modules())
    steps: list[Step] = []
    # The step that each node's result comes from, None for the model's input.
    results: dict[fx.Node, Step | None] = {}
    for node in graph_module.graph.nodes:
        if node.op == "output":
            return _needed(steps, _returned(node, results))
        if node not in recorder.shapes:
            continue
        if node.op == "get_attr" or (node.op == "placeholder" and results):
            raise ValueError(
                "compact handles networks of layers with one input, and the model also uses the tensor "
                f"{_qualified_name(node)!r}"
            )
        if node.op == "placeholder":
            results[node] = None
            continue
        new = _steps_of(node, modules, results, recorder.shapes)
        steps += new
        taken = results[_tensor_arguments(node, results)[0]]
        results[node] = new[-1] if new else taken
        if new and _changes_in_place(node, new[-1].module):
            overwritten = _before_dropout(taken)
            results |= {
                other: new[-1] for other, result in results.items() if _before_dropout(result) is overwritten
            }
    raise AssertionError("the graph has no output")


def _before_dropout(step: Step | None) -> Step | None:
    """The step whose result a step's is: dropout in evaluation mode hands on the tensor that it takes."""
    while step is not None and isinstance(step.module, DROPOUTS):
        (step,) = step.inputs
    return step


def _returned(output: fx.Node, results: Mapping[fx.Node, Step | None]) -> Step | None:
    node = output.args[0]
    if not isinstance(node, fx.Node) or node not in results:
        raise ValueError(f"compact handles models that return one tensor, and this one returns {node}")
    return results[node]


def _needed(steps: list[Step], last: Step | None) -> list[Step]:
    """Those that the result of the last one depends on, in their order."""
    needed = {last}
    for step in reversed(steps):
        if step in needed:
            needed.update(step.inputs)
    return [step for step in steps if step in needed]


def _only_source(node: fx.Node) -> fx.Node | None:
    """The node whose result a node transforms, or None if it combines several."""
    sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
    return sources[0] if len(sources) == 1 else None


def _tensor_arguments(node: fx.Node, results: Mapping[fx.Node, Step | None]) -> list[fx.Node]:
    """The tensors that a node takes, as often as it takes them."""
    arguments = (*node.args, *node.kwargs.values())
    return [value for value in arguments if isinstance(value, fx.Node) and value in results]


def _changes_in_place(node: fx.Node, module: nn.Module) -> bool:
    """True if a node, which does what a module does, overwrites the tensor that it takes."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = node.op != "call_module" and (name.endswith("_") or name == "iadd")
    return by_name or bool(node.kwargs.get("inplace")) or bool(getattr(module, "inplace", False))


def _steps_of(
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    results: Mapping[fx.Node, Step | None],
    shapes: Mapping[fx.Node, torch.Size],
) -> list[Step]:
    """The steps that do what a node does: none if it changes nothing, two for noise with an activation."""
    sources = _tensor_arguments(node, results)
    name, output_shape = _qualified_name(node), shapes[node]
    if _is_addition(node, sources):
        if any(shapes[source] != output_shape for source in sources):
            raise ValueError(
                f"compact handles additions of tensors of one shape, and {name!r} adds "
                + " and ".join(str(tuple(shapes[source])) for source in sources)
            )
        inputs = tuple(results[source] for source in sources)
        return [Step(name, Addition(), inputs, output_shape, output_shape)]
    if len(sources) != 1:
        raise _unsupported(node)
    (source,) = sources
    module = _stock_module(node, modules, shapes[source], output_shape)
    if module is None:
        return []
    step = Step(name, module, (results[source],), shapes[source], output_shape)
    if not isinstance(module, NoiseLayer) or module.activation is None:
        return [step]
    activation = replace(step, module=_ACTIVATIONS[module.activation]())
    return [activation, replace(step, inputs=(activation,))]


def _is_addition(node: fx.Node, sources: list[fx.Node]) -> bool:
    plain = len(sources) == 2 and len(node.args) + len(node.kwargs) == 2
    return node.op != "call_module" and node.target in _ADDITIONS and plain


def _stock_module(
    node: fx.Node, modules: Mapping[str, nn.Module], input_shape: torch.Size, output_shape: torch.Size
) -> nn.Module | None:
    """The module that a node calls or that does the same, None if it changes nothing."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    if type(module) is nn.Identity:
        return None
    if type(module) is nn.Flatten or node.target in _RESHAPING_FUNCTIONS:
        if output_shape == input_shape:
            return None
        if output_shape == (input_shape[0], math.prod(input_shape[1:])):
            return nn.Flatten()
        raise ValueError(
            f"compact handles no reshaping but flattening, and {_qualified_name(node)!r} turns shape "
            f"{tuple(input_shape)} into {tuple(output_shape)}"
        )
    if module is not None:
        return module
    if node.target in _DROPOUT_FUNCTIONS and node.kwargs.get("training") is False:
        return None
    return _module_of_call(node)


def _module_of_call(node: fx.Node) -> nn.Module:
    module_type = _MODULE_OF_FUNCTION.get(node.target)
    options = {k: v for k, v in node.kwargs.items() if k not in ("input", "inplace", "_stacklevel")}
    if options.get("dtype", 0) is None:
        del options["dtype"]
    arguments = node.args[0 if "input" in node.kwargs else 1 :]
    computed = any(isinstance(value, fx.Node) for value in (*arguments, *options.values()))
    if module_type is not None and not computed:
        try:
            return module_type(*arguments, **options)
        except TypeError:
            pass
    raise _unsupported(node)


def _unsupported(node: fx.Node) -> ValueError:
    where = (
        f"layer {_qualified_name(node)!r}"
        if node.op == "call_module"
        else f"the call at {_qualified_name(node)!r}"
    )
    return ValueError(f"compact does not support {where}: {node.format_node()}")
