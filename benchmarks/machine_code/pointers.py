"""Which of a kernel's pointers its loads and stores go to.

Addresses are hard to follow in machine code but easy in PTX, where they are sums of a parameter and offsets. An access
in machine code and one in PTX belong together if they come from the same line and are equally wide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.machine_code.sass import Instruction
from benchmarks.machine_code.source_lines import Line, Origin, relative

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"')
_LOCATION = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?")
_STATEMENT = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*);")
_PARAMETER = re.compile(r"\[\w+_param_(\d+)\]")
_REGISTER = re.compile(r"%rd\d+")
_ADDRESS = re.compile(r"\[\s*(%rd\d+)")

# "load" or "store", bytes, and the innermost line with that of the call around it, if any.
Key = tuple[str, int, tuple[Line, ...]]


class Pointers:
    """What a kernel's accesses go to, by the lines they come from."""

    def __init__(self, ptx: str, signature: Mapping[str, str]) -> None:
        """Read PTX.

        Args:
            ptx: the kernel.
            signature: Triton's type of each parameter; constexpr ones are not passed.
        """
        passed = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
        self._sources: dict[str, set[str]] = {}
        self._parameters: dict[str, str] = {}
        accesses: list[tuple[Key, str]] = []
        for lines, opcode, operands in _statements(ptx):
            registers = _REGISTER.findall(operands)
            parts = opcode.split(".")
            if parts[0] in ("ld", "st", "red", "atom") and "global" in parts:
                address = _ADDRESS.search(operands)
                if address:
                    accesses.append(
                        (("load" if parts[0] == "ld" else "store", _bytes(parts), lines), address[1])
                    )
            elif parts[:2] == ["ld", "param"] and registers:
                parameter = _PARAMETER.search(operands)
                if parameter and int(parameter[1]) < len(passed):
                    name, kind = passed[int(parameter[1])]
                    if kind.startswith("*"):
                        self._parameters[registers[0]] = name
            elif parts[0] != "ld" and registers and operands.lstrip().startswith(registers[0]):
                self._sources.setdefault(registers[0], set()).update(registers[1:])
        self._accesses = [(key, self._reached(register)) for key, register in accesses]

    def of(self, access: Instruction, origin: Origin) -> frozenset[str]:
        """Return the parameters that an access in machine code may go to; empty if nothing says it."""
        direction, width = access.direction, access.access_bytes
        for depth, same_width in ((2, True), (1, True), (2, False), (1, False)):
            names = [
                reached
                for (in_ptx, bytes_in_ptx, lines), reached in self._accesses
                if in_ptx == direction
                and lines[:depth] == origin[:depth]
                and (bytes_in_ptx == width or not same_width)
            ]
            if names:
                return frozenset().union(*names)
        return frozenset()

    def _reached(self, register: str) -> frozenset[str]:
        """Return the parameters from which a register is computed."""
        names, seen, pending = set(), {register}, [register]
        while pending:
            current = pending.pop()
            if current in self._parameters:
                names.add(self._parameters[current])
            for source in self._sources.get(current, ()):
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
        return frozenset(names)


def _bytes(parts: Sequence[str]) -> int:
    """Return the bytes that an access in PTX is wide, from its opcode's parts such as v4 and b32."""
    bits = [int(part[1:]) for part in parts if re.fullmatch(r"[bsuf](8|16|32|64|128)", part)]
    vector = [int(part[1:]) for part in parts if re.fullmatch(r"v[248]", part)]
    return math.prod(bits + vector) // 8


def _statements(ptx: str) -> Iterator[tuple[tuple[Line, ...], str, str]]:
    """Yield the lines, the opcode and the operands of each statement."""
    files = {match[1]: relative(match[2]) for line in ptx.splitlines() if (match := _FILE.match(line))}
    lines: Sequence[Line] = ()
    for text in ptx.splitlines():
        if match := _LOCATION.match(text):
            numbers = [(match[1], match[2]), (match[3], match[4])]
            lines = [Line(files.get(file, ""), int(number)) for file, number in numbers if file]
        elif match := _STATEMENT.match(text):
            yield tuple(lines), match[1], match[2]
