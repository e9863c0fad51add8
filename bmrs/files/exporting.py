"""`export`: a network for other runtimes, run by them before it is handed over."""

from __future__ import annotations

import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten

from bmrs.checks import as_path, check_choice, check_module, one_line
from bmrs.compaction.comparison import TOLERANCES, relative_difference
from bmrs.files.atomic import write_atomically
from bmrs.graph.capture import export_program
from bmrs.graph.copies import evaluation_copy
from bmrs.graph.inputs import Inputs, as_inputs, map_tensors
from bmrs.graph.nodes import layer_of
from bmrs.names import FORMATS, ExportFormat
from bmrs.noise.lookup import noise_layers

SUFFIXES: dict[str, str] = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt"}
"""Of files of each format, by habit."""

_RUNTIMES = {"onnx": "onnxruntime", "pt2": "torch.export.load", "torchscript": "torch.jit.load"}
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote; ``str()`` gives a text.

    Attributes:
        path: the file.
        format: see `export`.
        file_size: its bytes.
        runtime: what ran it, with its version.
        difference: largest difference of its outputs from the network's, relative to the largest output, over the
            examples and, with ``dynamic_batch``, over other numbers of them.
        dynamic_batch: whether it takes other numbers of examples.
        fixed_because: why not; empty if it does.
    """

    path: Path
    format: str
    file_size: int
    runtime: str
    difference: float
    dynamic_batch: bool
    fixed_because: str = ""

    def __str__(self) -> str:
        batch = "any number of examples" if self.dynamic_batch else "the number of the examples alone"
        why = f": {self.fixed_because}" if self.fixed_because else ""
        return (
            f"{self.path}: {self.file_size:,} bytes, {self.format}; run by {self.runtime}, its outputs differ by "
            f"{self.difference:.1e} of the largest; it takes {batch}{why}"
        )


def export(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    format: ExportFormat = "onnx",
    overwrite: bool = False,
) -> ExportReport:
    """Write a network in the format of another runtime, once that runtime has given the same outputs.

    The first dimension of every input is taken for that of the examples, of which the exported network takes any
    number where the network does. It is written in a single step, and not at all if something is wrong.

    Args:
        model: a network without noise layers, in any mode, such as `bmrs.compact`, `bmrs.fold` and `bmrs.load` return;
            it is exported as it is in evaluation mode, and left as it is.
        example_inputs: its input, as `bmrs.compact` takes it.
        path: the file.
        format: ``"onnx"`` (run by onnxruntime; needs the packages onnx, onnxscript and onnxruntime), ``"pt2"`` (a
            program of torch.export, run by `torch.export.load`) or ``"torchscript"`` (a trace, run by `torch.jit.load`,
            which torch has deprecated). Those of torch are for the device that the model is on.
        overwrite: whether a file there is replaced.

    Returns:
        What was written and how exact it is.

    Raises:
        TypeError: ``model`` is not a module or has noise layers (one is named), or ``example_inputs`` hold no tensor.
        ValueError: ``format`` is unknown, the model does not run on the example, or it cannot be exported; the place is
            named.
        FileExistsError, FileNotFoundError: there is a file already, or no folder.
        ModuleNotFoundError: packages for ONNX are missing; it says which.
        RuntimeError: the runtime refuses the exported network, or its outputs differ.
    """
    check_choice("format", format, FORMATS)
    check_choice("overwrite", overwrite, (False, True))
    check_module(model)
    path = as_path("path", path)
    check_target(path, overwrite)
    if noisy := list(noise_layers(model)):
        raise TypeError(
            f"export needs a model without noise layers, and {noisy[0]!r} is one: bmrs.compact(model, example_inputs) "
            "makes a smaller one, bmrs.fold(model) one of full size"
        )
    if format == "onnx":
        check_packages()
    with torch.inference_mode(False), torch.no_grad():
        network = evaluation_copy(model)
        inputs = as_inputs(example_inputs, network)
        content = _CONTENT[format](network, inputs)
        run = open_exported(content, format)
        difference, fixed_because = _compare(network, run, inputs, format)
    write_atomically(path, content)
    package = "onnxruntime" if format == "onnx" else "torch"
    return ExportReport(
        path=path,
        format=format,
        file_size=len(content),
        runtime=f"{_RUNTIMES[format]} ({package} {metadata.version(package)})",
        difference=difference,
        dynamic_batch=not fixed_because,
        fixed_because=fixed_because,
    )


def check_target(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError or FileNotFoundError where a file cannot be written or must not be replaced."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder, expected the name of a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: give another file, or overwrite=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, for the file {path.name}")


def check_packages() -> None:
    """Raise ModuleNotFoundError unless all that ONNX needs is installed."""
    missing = []
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            missing.append(name)
    if missing:
        raise ModuleNotFoundError(
            f"the format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )


class Exported(nn.Module):
    """An exported network as its runtime runs it, with one thread if on a CPU where the runtime can be told.

    Args:
        function: what runs it, on the arguments of the network; it returns its tensors.
    """

    def __init__(self, function: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the tensors that the network returns."""
        return self.function(*args, **kwargs)


def open_exported(content: bytes, format: str) -> Exported:
    """Return an exported network, of the bytes of its file.

    Raises:
        RuntimeError: the runtime refuses it.
    """
    try:
        with _quiet():
            if format == "onnx":
                return Exported(_onnx_session(content))
            if format == "pt2":
                module: Any = torch.export.load(io.BytesIO(content)).module()
            else:
                module = torch.jit.load(io.BytesIO(content))
    except Exception as error:
        raise RuntimeError(
            f"{_RUNTIMES[format]} refuses the exported network: {type(error).__name__}: {one_line(error)}; nothing was "
            "written"
        ) from error
    return Exported(lambda *args, **kwargs: _tensors(module(*args, **kwargs)))


def _onnx_session(content: bytes) -> Callable[..., list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arrays = [tensor.numpy(force=True) for tensor in _tensors((args, kwargs))]
        return [torch.from_numpy(value) for value in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def _onnx(network: nn.Module, inputs: Inputs) -> bytes:
    program = _program(network, inputs)
    try:
        with _quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
        assert exported is not None, "which dynamo=True returns"
        content: bytes = exported.model_proto.SerializeToString()
        return content
    except Exception as error:
        raise ValueError(
            f"torch.onnx cannot export {type(network).__name__}{_layers_in(error, program)}: {_in_short(error)}; "
            'format="pt2" needs no ONNX'
        ) from error


def _pt2(network: nn.Module, inputs: Inputs) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(_program(network, inputs), buffer)
    return buffer.getvalue()


def _torchscript(network: nn.Module, inputs: Inputs) -> bytes:
    args, kwargs = map_tensors(torch.clone, inputs)
    named = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    if args and kwargs:
        raise ValueError("torchscript takes positional or keyword arguments, and example_inputs hold both")
    # A trace would take one side of a branch on values without a word.
    _program(network, inputs)
    buffer = io.BytesIO()
    try:
        with _quiet():
            torch.jit.save(torch.jit.trace(network, check_trace=False, strict=False, **named), buffer)
    except Exception as error:
        raise ValueError(
            f"torch.jit cannot trace {type(network).__name__}: {_in_short(error)}; take format='pt2'"
        ) from error
    return buffer.getvalue()


_CONTENT: dict[str, Callable[[nn.Module, Inputs], bytes]] = {
    "onnx": _onnx,
    "pt2": _pt2,
    "torchscript": _torchscript,
}


def _program(network: nn.Module, inputs: Inputs) -> ExportedProgram:
    advice = "No format takes a model that branches on values"
    return export_program(network, inputs, "export", dynamic="first", advice=advice)


def _compare(network: nn.Module, run: Exported, inputs: Inputs, format: str) -> tuple[float, str]:
    """Return the largest difference, and why the exported network takes no other number of examples, "" if it does."""
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    tolerance = max((TOLERANCES.get(dtype, 1e-4) for dtype in dtypes), default=1e-4)
    try:
        largest = _difference(network, run, inputs)
    except Exception as error:
        raise RuntimeError(
            f"{_RUNTIMES[format]} does not run the exported network on the example: {type(error).__name__}: "
            f"{one_line(error)}; nothing was written"
        ) from error
    other_numbers = _other_numbers(network, inputs)
    fixed_because = "" if other_numbers else "the network itself takes no other one"
    for number, others in other_numbers.items():
        try:
            difference = _difference(network, run, others)
        except Exception as error:
            fixed_because = f"of {number} it says {type(error).__name__}: {one_line(error)}"
            break
        if format == "torchscript" and not difference <= tolerance:
            raise RuntimeError(
                f"the trace gives wrong outputs for {number} examples, as a number of examples went into it as a "
                'constant; nothing was written: take format="pt2" or "onnx"'
            )
        largest = max(largest, difference)
    if not largest <= tolerance:
        raise RuntimeError(
            f"the exported network's outputs, run by {_RUNTIMES[format]}, differ from the network's by {largest:.1e} "
            f"of the largest, expected at most {tolerance:g}; nothing was written"
        )
    return largest, fixed_because


def _difference(network: nn.Module, run: Exported, inputs: Inputs) -> float:
    (args, kwargs), (own_args, own_kwargs) = (map_tensors(torch.clone, inputs) for _ in range(2))
    expected = _tensors(network(*own_args, **own_kwargs))
    return relative_difference([t.cpu() for t in expected], [t.cpu() for t in run(*args, **kwargs)])


def _other_numbers(network: nn.Module, inputs: Inputs) -> dict[int, Inputs]:
    """Return other numbers of examples, one and one more, that the network itself takes."""
    tensors = _tensors(inputs)
    if any(not tensor.dim() for tensor in tensors) or len({len(tensor) for tensor in tensors}) != 1:
        return {}
    number = len(tensors[0])
    found = {}
    for size in {1, number + 1} - {number}:
        index = torch.arange(size) % number
        others = map_tensors(lambda t, index=index: t[index.to(t.device)], inputs)  # type: ignore[misc]
        try:
            args, kwargs = map_tensors(torch.clone, others)
            network(*args, **kwargs)
        except Exception:  # it is made for one number alone
            continue
        found[size] = others
    return found


def _layers_in(error: Exception, program: ExportedProgram) -> str:
    """Return the layers of which an error names operators, as a part of a sentence."""
    nodes = list(program.graph.nodes)
    try:
        with _quiet():  # into the operators that ONNX is made from
            nodes += program.run_decompositions(dict(torch._decomp.decomposition_table)).graph.nodes
    except Exception:  # the error that matters is known
        pass
    text = str(_first_cause(error))
    found = {
        f"{node.target} in layer {layer_of(node)!r}"
        for node in nodes
        if isinstance(node.target, torch._ops.OpOverload) and repr(node.target) in text and layer_of(node)
    }
    return f" ({', '.join(sorted(found)[:3])})" if found else ""


def _in_short(error: Exception) -> str:
    cause = _first_cause(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {one_line(lines[0] if lines else '')}"


def _first_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def _tensors(result: Any) -> list[Tensor]:
    leaves = tree_flatten(dict(result) if isinstance(result, Mapping) else result)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from warning of its own code, such as that tracing is deprecated, and of packages it would know."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
