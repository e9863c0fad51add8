"""What torch.fx sees of a model: its layers as a chain, and what produces each noise layer's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bmrs.compaction.stock_layers import WEIGHT_LAYERS, WeightLayer
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
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Step:
    """One operation of a chain.

    Attributes:
        name: qualified name of the module, or the graph's name of the function call.
        module: the module, or for a function call the stock module that does the same.
        input_shape: shape of its input on the example, batch dimension included.
        output_shape: shape of its output.
    """

    name: str
    module: nn.Module
    input_shape: torch.Size
    output_shape: torch.Size

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.module).__name__})"


class _Tracer(fx.Tracer):
    """Records noise layers as single calls, those behind a layer's forward hook included."""

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


def _trace(model: nn.Module, purpose: str) -> fx.GraphModule:
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
    """The module's name as the model's ``named_modules`` gives it, or the node's own."""
    return str(node.target).partition(".")[2] if node.op == "call_module" else node.name


def producers(model: nn.Module, purpose: str) -> dict[NoiseLayer, WeightLayer]:
    """The linear or convolution layer whose output each noise layer scales, through other operations or not.

    Args:
        model: any model that torch.fx can trace.
        purpose: who asks, for errors.

    Returns:
        The producer of each noise layer that has a single one.
    """
    graph_module = _trace(model, purpose)
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


def trace_chain(model: nn.Module, example: Tensor) -> list[Step]:
    """A model in evaluation mode as a chain of stock modules and noise layers.

    Identities, dropout functions and reshapings that change nothing are left out. The fused activation of a
    noise layer becomes a step before it, with the same name.

    Args:
        model: model in evaluation mode.
        example: its input, at least one example.

    Raises:
        ValueError: torch.fx cannot trace the model, it does not run on the example, it branches, or it calls
            what no stock module here does.
    """
    graph_module = _trace(model, "compact")
    recorder = _ShapeRecorder(graph_module)
    try:
        with torch.no_grad():
            recorder.run(example)
    except Exception as error:
        raise ValueError(
            f"the model does not run on example_inputs of shape {tuple(example.shape)} and {example.dtype}: {error}"
        ) from error
    modules = dict(graph_module.named_modules())
    steps: list[Step] = []
    previous: fx.Node | None = None
    for node in graph_module.graph.nodes:
        is_output = node.op == "output"
        if node not in recorder.shapes and not is_output:
            continue
        sources = [source for source in node.all_input_nodes if source in recorder.shapes]
        if node.op == "placeholder" and previous is None:
            previous = node
            continue
        if sources != [previous] or (is_output and node.args[0] is not previous):
            raise ValueError(_branch_message(node, sources))
        if is_output:
            break
        assert previous is not None
        shapes = recorder.shapes[previous], recorder.shapes[node]
        module = _stock_module(node, modules, *shapes)
        previous = node
        if isinstance(module, NoiseLayer) and module.activation is not None:
            steps.append(Step(_qualified_name(node), _ACTIVATIONS[module.activation](), *shapes))
        if module is not None:
            steps.append(Step(_qualified_name(node), module, *shapes))
    return steps


def _only_source(node: fx.Node) -> fx.Node | None:
    """The node whose result a node transforms, or None if it combines several."""
    sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
    return sources[0] if len(sources) == 1 else None


def _branch_message(node: fx.Node, sources: list[fx.Node]) -> str:
    name = _qualified_name(node)
    if node.op in ("placeholder", "get_attr"):
        return f"compact handles chains of layers with one input, and the model also uses the tensor {name!r}"
    names = ", ".join(repr(_qualified_name(source)) for source in sources) or "no tensor"
    return (
        "compact handles chains of layers, in which each uses the result of the one before, and the model "
        f"branches at {name!r} ({node.op} {node.target}), which uses {names}"
    )


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
    raise ValueError(f"compact does not support the call at {node.name!r}: {node.format_node()}")
