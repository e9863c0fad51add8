"""From the line information of machine code back to the source: the functions and the loops it comes from."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import bmrs_kernels

PACKAGE = Path(bmrs_kernels.__file__).parent

_LOCATION = re.compile(r'//## File "([^"]*)", line (\d+)( inlined at)?')
_ADDRESS = re.compile(r"/\*([0-9a-f]{4,})\*/\s")


class Line(NamedTuple):
    """A line of the package's source."""

    file: str  # relative to the package; anything else is another package's
    number: int


# The lines that led to an instruction: its own, that of the call around it, and so on up to the kernel's.
Origin = tuple[Line, ...]


def read_origins(text: str) -> dict[int, Origin]:
    """Return where instructions come from, by address, as ``nvdisasm -gi`` prints it."""
    origins: dict[int, Origin] = {}
    origin: list[Line] = []
    complete = True
    for line in text.splitlines():
        if match := _LOCATION.search(line):
            if complete:
                origin = []
            origin.append(Line(relative(match[1]), int(match[2])))
            complete = False
        elif match := _ADDRESS.search(line):
            complete = True
            origins[int(match[1], 16)] = tuple(origin)
    return origins


def relative(file: str) -> str:
    """Return a file of the package relative to the package, and any other as it is."""
    # Triton's cache may hold machine code that another copy of the same source was compiled to.
    _, package, rest = file.rpartition(f"{PACKAGE.name}/")
    return rest if package else file


class Source:
    """A parsed file of the package."""

    def __init__(self, file: str) -> None:
        path = PACKAGE / file
        self.tree = ast.parse(path.read_text() if path.is_file() else "")

    @cached_property
    def functions(self) -> list[ast.FunctionDef]:
        """Every function."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]

    def function_at(self, number: int) -> ast.FunctionDef | None:
        """Return the innermost function around a line."""
        around = [function for function in self.functions if _covers(function, number)]
        return min(around, key=_length, default=None)


@cache
def source(file: str) -> Source:
    """Return a parsed file of the package."""
    return Source(file)


@cache
def function_names(origin: Origin) -> tuple[str, ...]:
    """Return the functions that an instruction comes from, the innermost first."""
    functions = (source(line.file).function_at(line.number) for line in origin)
    return tuple(function.name for function in functions if function is not None)


def loop_trips(kernel: Any, arguments: Mapping[str, Any], origins: Iterable[Origin]) -> int:
    """Return how often a loop of a kernel runs.

    Args:
        kernel: the jitted function.
        arguments: its arguments by name.
        origins: of the instructions in the loop.

    Raises:
        ValueError: the source does not say it.
    """
    function = kernel.fn
    file = relative(inspect.getsourcefile(function) or "")
    lines = Counter(origin[-1].number for origin in origins if origin and origin[-1].file == file)
    definition = next(node for node in source(file).functions if node.name == function.__name__)
    loops = [node for node in ast.walk(definition) if isinstance(node, ast.For) and _range(node) is not None]
    # The loop that most of the lines are in; of loops inside each other the innermost.
    loops.sort(key=_length)
    inside = [sum(count for line, count in lines.items() if _covers(loop, line)) for loop in loops]
    if not any(inside):
        raise ValueError(f"{function.__name__}: a loop in the machine code is none of the kernel's own")
    loop = loops[inside.index(max(inside))]
    header = _range(loop)
    assert header is not None
    names = {**function.__globals__, **arguments}
    try:
        values = [
            eval(compile(ast.Expression(argument), file, "eval"), {"__builtins__": {}}, names)
            for argument in header.args
        ]
        return len(range(*values))
    except (NameError, TypeError) as error:
        raise ValueError(f"{function.__name__}: cannot tell how often {ast.unparse(header)} runs") from error


def _range(loop: ast.For) -> ast.Call | None:
    call = loop.iter
    if not isinstance(call, ast.Call):
        return None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return call if name == "range" else None


def _covers(node: ast.stmt | ast.expr, number: int) -> bool:
    return node.lineno <= number <= (node.end_lineno or node.lineno)


def _length(node: ast.stmt | ast.expr) -> int:
    return (node.end_lineno or node.lineno) - node.lineno
