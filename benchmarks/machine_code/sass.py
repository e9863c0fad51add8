"""NVIDIA's machine code as nvdisasm and cuobjdump print it: instructions, their kinds, and the paths through a kernel.

A kernel branches on what its structures need, so that no program executes all of its instructions. ``read_paths``
finds the ways through its control flow and counts the instructions of each, outside of loops and per iteration:

- Branches are decided by *labels* that the caller gives to instructions: of the ways between a branch and the point
  where they meet again, those that differ in labels are kept apart, and a label that is taken at one branch is taken
  at all.
- Of ways that do not differ in labels the longest counts: lanes may go different ways.
- Subroutines are where divisions and square roots end up at the edge of the exponents' range: a way with a call does
  not count where there is one without.
- Loops are taken to run at least once.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_REFERENCE = re.compile(r"`\(([.$\w]+)\)")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_PREDICATE_OPERAND = re.compile(r"^!?U?P[0-9]")
_ZERO_FACTORS = re.compile(r"^U?R[0-9]+, -?RZ, -?RZ,")

CLASSES = (
    "float32",
    "float64",
    "integer and logic",
    "conversion",
    "special function",
    "global load",
    "global store",
    "spill",
    "shared and barrier",
    "control and move",
)

# Results per clock and multiprocessor at compute capability 9.0: "Throughput of Native Arithmetic Instructions" in the
# CUDA programming guide. The pipelines in the profiling guide of Nsight Compute tell which instructions share a unit.
LANES_PER_CLOCK = {"fma": 128, "imad": 64, "alu": 64, "float64": 64, "special": 16, "memory": 32}
# Multiplications of integers take a half of the unit that multiplies float32.
UNIT_OF_RATE = {"imad": "fma"}

_FLOAT32 = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "FSWZADD"}
_FLOAT32_COMPARISONS = {"FSETP", "FSEL", "FMNMX", "FMNMX3", "FCHK", "FSET"}
_HALF = {"HADD2", "HMUL2", "HFMA2", "HSETP2", "HMNMX2", "HSET2"}
_FLOAT64 = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
_INTEGER = {
    *("IADD", "IADD3", "IMAD", "IMUL", "IABS", "IMNMX", "ISETP", "ISCADD", "IDP", "VIADD", "VIADDMNMX"),
    *("VIMNMX", "VIMNMX3", "VABSDIFF", "LOP", "LOP3", "PLOP3", "LEA", "SHF", "SHL", "SHR", "SEL", "PRMT"),
    *("SGXT", "BMSK", "BREV", "FLO", "POPC"),
}
_CONVERSIONS = {"F2F", "F2I", "I2F", "I2I", "FRND", "F2FP", "I2FP", "F2IP", "I2IP"}
_PACKED_CONVERSIONS = {"F2FP", "I2FP", "F2IP", "I2IP", "I2I"}
_LOADS = {"LDG", "LD", "LDGSTS"}
_STORES = {"STG", "ST", "RED", "REDG", "ATOM", "ATOMG"}
_SPILLS = {"LDL", "STL"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "REDUX", "CREDUX", "MATCH"}
_BARRIERS = {"BAR", "MEMBAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "VOTE", "VOTEU", "SYNCS", "FENCE"}


class Kind(NamedTuple):
    """What an instruction is counted as: one of ``CLASSES``, and the rate at which it executes, if it has one."""

    name: str
    rate: str | None


class Instruction(NamedTuple):
    """A line of machine code."""

    address: int
    guard: str  # the predicate under which it is executed, empty if always
    opcode: str  # with modifiers
    operands: str

    @property
    def mnemonic(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> Kind:
        """Its class and rate."""
        return _kind(self.opcode, _ZERO_FACTORS.match(self.operands) is not None)

    @property
    def is_access(self) -> bool:
        """Whether it reads or writes device memory other than the stack."""
        return self.mnemonic in _LOADS | _STORES

    @property
    def direction(self) -> str:
        """Whether an access is a "load" or a "store"."""
        return "load" if self.mnemonic in _LOADS else "store"

    @property
    def access_bytes(self) -> int:
        """The bytes that a lane reads or writes."""
        for modifier in self.opcode.split("."):
            if modifier in ("U8", "S8"):
                return 1
            if modifier in ("U16", "S16"):
                return 2
            if modifier in ("64", "128", "256"):
                return int(modifier) // 8
        return 4

    @property
    def target(self) -> int | None:
        """The address that a branch or a call goes to."""
        match = _TARGET.search(self.operands)
        return int(match[1], 16) if self.mnemonic in ("BRA", "CALL") and match else None

    @property
    def is_conditional(self) -> bool:
        """Whether a branch or an exit may be passed over."""
        return self.guard not in ("", "PT", "UPT") or bool(_PREDICATE_OPERAND.match(self.operands))


@cache
def _kind(opcode: str, zero_factors: bool) -> Kind:
    mnemonic, _, modifiers = opcode.partition(".")
    uniform = (
        mnemonic.startswith("U") and mnemonic[1:] in _INTEGER | _FLOAT32 | _FLOAT32_COMPARISONS | _CONVERSIONS
    )
    if uniform:  # once for a warp, by a unit of its own
        return Kind(_kind(mnemonic[1:], False).name, None)
    if mnemonic in _FLOAT32:
        return Kind("float32", "fma")
    if mnemonic in _FLOAT32_COMPARISONS:
        return Kind("float32", "alu")
    if mnemonic in _HALF:
        return Kind("control and move" if zero_factors else "float32", "fma")
    if mnemonic in _FLOAT64:
        return Kind("float64", "float64")
    if mnemonic in ("IMAD", "IMUL"):
        move = zero_factors or modifiers.startswith("MOV")
        return Kind("control and move" if move else "integer and logic", "imad")
    if mnemonic in _INTEGER:
        return Kind("integer and logic", "alu")
    if mnemonic in _CONVERSIONS:
        return Kind("conversion", "alu" if mnemonic in _PACKED_CONVERSIONS else "special")
    if mnemonic == "MUFU":
        return Kind("special function", "special")
    if mnemonic in _LOADS:
        return Kind("global load", "memory")
    if mnemonic in _STORES:
        return Kind("global store", "memory")
    if mnemonic in _SPILLS:
        return Kind("spill", "memory")
    if mnemonic in _SHARED:
        return Kind("shared and barrier", "memory")
    return Kind("shared and barrier" if mnemonic in _BARRIERS else "control and move", None)


def parse(text: str) -> list[Instruction]:
    """Return the instructions of a kernel as ``nvdisasm -c`` or ``cuobjdump -sass`` prints them."""
    addresses: dict[str, str] = {}
    labels: list[str] = []
    found = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif instruction := _INSTRUCTION.search(line):
            address, guard, opcode, operands = instruction.groups()
            addresses |= dict.fromkeys(labels, f"0x{address}")
            labels = []
            found.append((int(address, 16), guard or "", opcode, operands))
    return [
        Instruction(address, guard, opcode, _REFERENCE.sub(lambda name: addresses[name[1]], operands).strip())
        for address, guard, opcode, operands in found
    ]


def unit_clocks(counts: Mapping[Kind, float]) -> dict[str, float]:
    """Return for how many clocks a multiprocessor's units are busy with one warp's instructions."""
    clocks: dict[str, float] = {}
    for kind, count in counts.items():
        if kind.rate is not None:
            unit = UNIT_OF_RATE.get(kind.rate, kind.rate)
            clocks[unit] = clocks.get(unit, 0.0) + count * 32 / LANES_PER_CLOCK[kind.rate]
    return clocks


class Place(NamedTuple):
    """Where instructions are counted: the loops around them, by their first address, outermost first."""

    loops: tuple[int, ...]
    label: str
    kind: Kind


class Path(NamedTuple):
    """A way through a kernel."""

    labels: frozenset[str]
    counts: Mapping[tuple[tuple[int, ...], Kind], int]  # by loops and kind

    def total(self, trips: Mapping[int, int]) -> Counter[Kind]:
        """Return the instructions that a warp executes, given how often each loop runs."""
        total: Counter[Kind] = Counter()
        for (loops, kind), count in self.counts.items():
            for loop in loops:
                count *= trips[loop]
            total[kind] += count
        return total


@dataclass(frozen=True)
class Paths:
    """The ways through a kernel, and its loops: the addresses inside each, by its first."""

    paths: list[Path]
    loops: dict[int, frozenset[int]]
    reachable: frozenset[int]


# A way has a label if it has this many instructions with it beyond what all ways have, and this share of all such
# instructions: compilers move and merge instructions, which then carry the label of another place.
LABEL_THRESHOLD, LABEL_SHARE = 8, 0.2


def read_paths(instructions: Sequence[Instruction], labels: Mapping[int, str] | None = None) -> Paths:
    """Return the ways through a kernel.

    Args:
        instructions: the kernel, from its entry.
        labels: by address; see the module.
    """
    graph, blocks = _blocks(instructions, labels or {})
    entry = instructions[0].address
    reachable = frozenset(
        instruction.address for start in _reachable(graph, entry) for instruction in blocks[start]
    )
    loops = _collapse_loops(graph, entry, blocks)
    choice = _Region(graph, entry, _EXIT).choice()
    paths = []
    for chosen, option in choice.options.items():
        by_label: Counter[str] = Counter()
        counts: Counter[tuple[tuple[int, ...], Kind]] = Counter()
        for place, count in option.counts.items():
            by_label[place.label] += count
            counts[place.loops, place.kind] += count
        common = {
            label
            for label, count in by_label.items()
            if label and label not in choice.labels and count >= LABEL_THRESHOLD
        }
        paths.append(Path(chosen | common, counts))
    return Paths(sorted(paths, key=lambda path: sum(path.counts.values())), loops, reachable)


_EXIT = -1


class _Option(NamedTuple):
    """A way through a part of a kernel."""

    counts: Counter[Place]
    calls: bool = False

    @property
    def size(self) -> int:
        return self.counts.total()

    @property
    def has_loop(self) -> bool:
        return any(place.loops for place in self.counts)

    def then(self, other: _Option) -> _Option:
        return _Option(self.counts + other.counts, self.calls or other.calls)


class _Choice(NamedTuple):
    """The ways through a part of a kernel, by which of the labels that tell them apart each has."""

    labels: frozenset[str]
    options: dict[frozenset[str], _Option]

    @classmethod
    def only(cls, option: _Option) -> _Choice:
        return cls(frozenset(), {frozenset(): option})

    def then(self, other: _Choice) -> _Choice:
        """Return the ways through this part and the one behind it that agree on the labels of both."""
        options = {
            first | second: self.options[first].then(other.options[second])
            for first in self.options
            for second in other.options
            if first & other.labels == second & self.labels
        }
        assert options, "no way through the kernel takes the same labels everywhere"
        return _Choice(self.labels | other.labels, options)

    def in_loop(self, loop: int) -> _Choice:
        """Return the same inside a loop."""
        options = {
            chosen: option._replace(
                counts=Counter(
                    {
                        place._replace(loops=(loop, *place.loops)): count
                        for place, count in option.counts.items()
                    }
                )
            )
            for chosen, option in self.options.items()
        }
        return _Choice(self.labels, options)


def _either(choices: Iterable[_Choice]) -> _Choice:
    """Return the ways behind a branch."""
    options = [option for choice in choices for option in choice.options.values()]
    for counts_less in (lambda option: option.calls, lambda option: not option.has_loop):
        if not all(map(counts_less, options)):
            options = [option for option in options if not counts_less(option)]
    labelled = [_label_counts(option) for option in options]
    least = {
        label: min(counts[label] for counts in labelled)
        for label in {*itertools.chain.from_iterable(labelled)}
    }
    longest: dict[frozenset[str], _Option] = {}
    for counts, option in zip(labelled, options, strict=True):
        more = {label: counts[label] - fewest for label, fewest in least.items()}
        needed = max(LABEL_THRESHOLD, LABEL_SHARE * sum(more.values()))
        chosen = frozenset(label for label, number in more.items() if number >= needed)
        if chosen not in longest or option.size > longest[chosen].size:
            longest[chosen] = option
    if len(longest) == 1:
        return _Choice.only(next(iter(longest.values())))
    return _Choice(frozenset().union(*longest), longest)


def _label_counts(option: _Option) -> Counter[str]:
    counts: Counter[str] = Counter()
    for place, count in option.counts.items():
        if place.label:
            counts[place.label] += count
    return counts


@dataclass
class _Node:
    """A stretch of code with one way in, and where it goes."""

    choice: _Choice
    successors: list[int] = field(default_factory=list)


_Graph = dict[int, _Node]


def _blocks(
    instructions: Sequence[Instruction], labels: Mapping[int, str]
) -> tuple[_Graph, dict[int, list[Instruction]]]:
    """Return the control flow between stretches without branches, and what those hold, by their first address."""
    subroutines = _subroutines(instructions)
    starts = {instructions[0].address}
    for instruction, following in itertools.pairwise(instructions):
        if instruction.mnemonic in ("BRX", "JMX", "JMP", "UBRA"):
            raise ValueError(f"cannot follow {instruction.opcode} {instruction.operands}")
        if instruction.mnemonic in ("BRA", "EXIT", "RET", "CALL"):
            starts.add(following.address)
        if instruction.target is not None:
            starts.add(instruction.target)
    blocks: dict[int, list[Instruction]] = {}
    for instruction in instructions:
        if instruction.address in starts:
            current = blocks[instruction.address] = []
        current.append(instruction)
    graph: _Graph = {}
    order = list(blocks)
    for start, following in zip(order, [*order[1:], _EXIT], strict=True):
        block = blocks[start]
        counts = Counter(
            Place((), labels.get(instruction.address, ""), instruction.kind)
            for instruction in block
            if instruction.mnemonic != "NOP"
        )
        last = block[-1]
        calls = last.mnemonic == "CALL" and last.target in subroutines
        node = graph[start] = _Node(_Choice.only(_Option(counts, calls)))
        if calls:
            node.successors = [following]
        elif last.mnemonic in ("EXIT", "RET"):
            node.successors = [following, _EXIT] if last.is_conditional else [_EXIT]
        elif last.target is not None and not last.opcode.startswith("BRA.DIV"):
            node.successors = [following, last.target] if last.is_conditional else [last.target]
        else:  # BRA.DIV is taken by warps whose lanes have parted, which ours have not
            node.successors = [following]
    return graph, blocks


def _subroutines(instructions: Sequence[Instruction]) -> set[int]:
    """Return where calls go that come back; compilers also leave loops by calls that do not."""
    positions = {instruction.address: position for position, instruction in enumerate(instructions)}
    found = set()
    for entry in {instruction.target for instruction in instructions if instruction.mnemonic == "CALL"}:
        if entry is None:
            continue
        seen, pending = {positions[entry]}, [positions[entry]]
        while pending:
            position = pending.pop()
            instruction = instructions[position]
            if instruction.mnemonic == "RET":
                found.add(entry)
                break
            following = []
            if instruction.mnemonic not in ("BRA", "EXIT") or instruction.is_conditional:
                following.append(position + 1)
            if instruction.mnemonic == "BRA" and instruction.target is not None:
                following.append(positions[instruction.target])
            for successor in following:
                if successor < len(instructions) and successor not in seen:
                    seen.add(successor)
                    pending.append(successor)
    return found


def _reachable(graph: _Graph, entry: int) -> set[int]:
    found, pending = {entry}, [entry]
    while pending:
        for successor in graph[pending.pop()].successors:
            if successor != _EXIT and successor not in found:
                found.add(successor)
                pending.append(successor)
    return found


def _collapse_loops(
    graph: _Graph, entry: int, blocks: Mapping[int, list[Instruction]]
) -> dict[int, frozenset[int]]:
    """Replace every loop by a node that holds an iteration; return the addresses in each by its first."""
    members = {start: {start} for start in graph}
    loops = {}
    while backward := _backward_edges(graph, entry):
        bodies = {header: _loop_body(graph, header, latches) for header, latches in backward.items()}
        header = min(bodies, key=lambda candidate: len(bodies[candidate]))
        body = bodies[header]
        exits = {
            successor for start in body for successor in graph[start].successors if successor not in body
        }
        inside = {
            start: _Node(
                graph[start].choice,
                [
                    _EXIT if successor == header else successor
                    for successor in graph[start].successors
                    if successor in body
                ],
            )
            for start in body
        }
        choice = _Region(inside, header, _EXIT).choice().in_loop(header)
        members[header] = set().union(*(members[start] for start in body))
        for start in body - {header}:
            del graph[start]
        graph[header] = _Node(choice, sorted(exits))
        loops[header] = frozenset(
            instruction.address for start in members[header] for instruction in blocks[start]
        )
    return loops


def _backward_edges(graph: _Graph, entry: int) -> dict[int, set[int]]:
    """Return for each loop's first node those that go back to it."""
    found: dict[int, set[int]] = {}
    on_way, seen = {entry}, {entry}
    stack = [(entry, iter(graph[entry].successors))]
    while stack:
        start, successors = stack[-1]
        for successor in successors:
            if successor in on_way:
                found.setdefault(successor, set()).add(start)
            elif successor != _EXIT and successor not in seen:
                seen.add(successor)
                on_way.add(successor)
                stack.append((successor, iter(graph[successor].successors)))
                break
        else:
            on_way.discard(start)
            stack.pop()
    return found


def _loop_body(graph: _Graph, header: int, latches: set[int]) -> set[int]:
    predecessors: dict[int, list[int]] = {}
    for start in _reachable(graph, header):
        for successor in graph[start].successors:
            predecessors.setdefault(successor, []).append(start)
    body, pending = {header}, list(latches)
    while pending:
        start = pending.pop()
        if start not in body:
            body.add(start)
            pending += predecessors.get(start, [])
    return body


class _Region:
    """A part of the control flow without loops, from an entry to where all ways through it meet."""

    def __init__(self, graph: _Graph, entry: int, end: int) -> None:
        self.graph, self.entry, self.end = graph, entry, end
        self.meeting = self._meeting_points()
        self.known: dict[tuple[int, int], _Choice] = {}

    def choice(self) -> _Choice:
        """Return the ways from the entry to the end."""
        return self._between(self.entry, self.end)

    def _between(self, start: int, end: int) -> _Choice:
        if (start, end) in self.known:
            return self.known[start, end]
        choice, node = _Choice.only(_Option(Counter())), start
        while node != end:
            choice = choice.then(self.graph[node].choice)
            successors, meeting = self.graph[node].successors, self.meeting[node]
            if len(successors) > 1:
                choice = choice.then(_either(self._between(successor, meeting) for successor in successors))
            node = meeting
        self.known[start, end] = choice
        return choice

    def _meeting_points(self) -> dict[int, int]:
        """Return for each node the first that all ways from it to the end pass through."""
        order, depth, meeting = self._backward_order(), {self.end: 0}, {self.end: self.end}
        for node in order:
            common = None
            for successor in self.graph[node].successors:
                common = successor if common is None else _common(common, successor, meeting, depth)
            assert common is not None
            meeting[node], depth[node] = common, depth[common] + 1
        return meeting

    def _backward_order(self) -> list[int]:
        """Return the reachable nodes, each behind all that follow it."""
        order, seen = [], {self.entry, self.end}
        stack = [(self.entry, iter(self.graph[self.entry].successors))]
        while stack:
            node, successors = stack[-1]
            for successor in successors:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.graph[successor].successors)))
                    break
            else:
                order.append(node)
                stack.pop()
        return order


def _common(first: int, second: int, meeting: Mapping[int, int], depth: Mapping[int, int]) -> int:
    while first != second:
        if depth[first] < depth[second]:
            first, second = second, first
        first = meeting[first]
    return first
