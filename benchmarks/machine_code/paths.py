"""The ways through a kernel's machine code.

A kernel branches on what its structures need, so that no program executes all of its instructions. ``read_paths``
follows the control flow and counts the instructions of each way, outside of loops and for each turn of a loop:

- The caller gives *labels* to instructions. Of the ways between a branch and the point where they meet again, those
  that differ in labels are kept apart, and a way that takes a label at one branch takes it at every branch.
- Of ways that do not differ in labels the longest counts, since lanes may go different ways.
- Divisions and square roots call subroutines for operands at the edge of the exponents' range: a way with a call does
  not count where there is one without.
- Loops are taken to run at least once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.machine_code.sass import Instruction, Kind


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
        labels: by address; what they mean is said at the top of this file.
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
        """Return the ways through this part and then the next, if they agree on the labels that both parts have."""
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
    for instruction, next_one in itertools.pairwise(instructions):
        if instruction.mnemonic in ("BRX", "JMX", "JMP", "UBRA"):
            raise ValueError(f"cannot follow {instruction.opcode} {instruction.operands}")
        if instruction.mnemonic in ("BRA", "EXIT", "RET", "CALL"):
            starts.add(next_one.address)
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
    """Return the addresses of subroutines that return; compilers leave loops by calls that do not."""
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
    """Replace every loop by a node that holds one turn of it; return the addresses in each loop by its first one."""
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
    """Return, for the first node of each loop, the nodes that go back to it."""
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
        """Return, for each node, the first node that all ways from it to the end pass through."""
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
