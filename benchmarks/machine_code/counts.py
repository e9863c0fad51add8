"""What a case's machine code says: registers, spills, access widths, instructions and the time that they imply."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks import processes
from benchmarks.machine_code import sass
from benchmarks.machine_code.cases import CompiledCase, Launch, launches
from benchmarks.machine_code.compilation import MachineCode, compiled, compiling_for, machine_code
from benchmarks.machine_code.paths import Paths, read_paths
from benchmarks.machine_code.pointers import Pointers
from benchmarks.machine_code.source_lines import Origin, function_names, loop_trips, read_origins

# The functions of triton_log_noise between which kernels branch, outer ones first, and what their paths are called.
REGIMES = {
    "wide_tail_log_noise": "wide tail",
    "inside_log_noise": "inside",
    "wide_log_noise": "wide",
    "tail_log_noise": "tail",
    "exact_log_noise": "exact",
}
TYPICAL_PATH = "inside"
FLOOR_TARGET = "sm_90"


class Gpu(NamedTuple):
    """The capacities of a GPU that bound a kernel's time from below."""

    name: str
    multiprocessors: int
    schedulers: int  # of a multiprocessor, each issuing one instruction of a warp per clock
    clock_hz: float
    copy_bytes_per_s: float
    registers: int  # of a multiprocessor
    warps: int


# The boost clock of the data sheet. Memory: bytes read and written by a large device-to-device copy, per second.
H100 = Gpu("H100 SXM", 132, 4, 1.755e9, 3.0e12, 65536, 64)


@dataclass(frozen=True)
class Access:
    """Loads from or stores to a parameter in a kernel's machine code."""

    pointer: str
    direction: str  # "load" or "store"
    bytes: int  # of a lane
    count: int


class PathCost(NamedTuple):
    """A way through a kernel: instructions per element of x by class, and lower bounds of the time."""

    name: str
    instructions: dict[str, float]
    issue_us: float
    unit: str  # the unit that is busy for the longest
    unit_us: float
    memory_us: float

    @property
    def per_element(self) -> float:
        """Instructions per element."""
        return sum(self.instructions.values())

    @property
    def floor_us(self) -> float:
        """The least time that the launch takes."""
        return max(self.issue_us, self.unit_us, self.memory_us)


@dataclass(frozen=True)
class KernelCounts:
    """What the machine code of a kernel, as a case launches it, says."""

    target: str
    case: str
    stage: str  # "forward" or "backward"
    kernel: str  # with a number if the stage launches it more than once
    programs: int
    num_warps: int
    registers: int
    shared_bytes: int
    spills: str
    accesses: tuple[Access, ...] = ()
    activations: tuple[str, ...] = ()  # the parameters that are as large as x
    needs_wide_access: bool = False
    paths: tuple[PathCost, ...] = ()

    @property
    def resident_warps(self) -> int:
        """Warps of a multiprocessor that its registers have room for, on NVIDIA's GPUs."""
        of_a_warp = 32 * 8 * math.ceil(self.registers / 8)
        return min(H100.warps, H100.registers // of_a_warp) // self.num_warps * self.num_warps

    @property
    def typical(self) -> PathCost:
        """The path of structures inside their interval; the longest path if there is no such one."""
        named = [path for path in self.paths if path.name == TYPICAL_PATH]
        return named[0] if named else max(self.paths, key=lambda path: path.per_element)


class CaseCounts(NamedTuple):
    """The kernels of a case, or of several, and what went wrong."""

    measurements: list[KernelCounts]
    errors: list[str]


class Task(NamedTuple):
    """A case to measure for a target."""

    case: CompiledCase
    target: str
    disassemble: bool = True  # otherwise only the registers and spills are read


def measure_all(work: Sequence[Task], jobs: int) -> CaseCounts:
    """Measure cases for targets, in several processes."""
    # The slowest cases first, so that at the end no process works alone.
    order = sorted(work, key=lambda task: task.case.dtype != "float64")
    if jobs == 1:
        outcomes: Iterable[CaseCounts] = map(measure, order)
    else:
        with processes.workers(jobs) as pool:
            outcomes = list(pool.map(measure, order))
    found = dict(zip(order, outcomes, strict=True))
    in_order = [found[task] for task in work]
    return CaseCounts(
        [measurement for outcome in in_order for measurement in outcome.measurements],
        [error for outcome in in_order for error in outcome.errors],
    )


def measure(task: Task) -> CaseCounts:
    """Compile what a case launches and read it."""
    case, target, disassemble = task
    measurements, errors = [], []
    with compiling_for(target):
        for stage, started in launches(case).items():
            seen: Counter[str] = Counter()
            for launch in started:
                seen[launch.name] += 1
                name = launch.name if seen[launch.name] == 1 else f"{launch.name} {seen[launch.name]}"
                try:
                    code = _read(compiled(launch), disassemble=disassemble)
                    measurements.append(_measurement(case, target, stage, name, launch, code))
                except Exception as error:
                    lines = f"{type(error).__name__}: {error}".strip().splitlines()
                    errors.append(
                        f"{target}, {case.name}, {stage} {name}: {' ... '.join(lines[:1] + lines[1:][-1:])}"
                    )
    return CaseCounts(measurements, errors)


class _Code(NamedTuple):
    """A kernel's machine code and, for NVIDIA's GPUs, what it consists of."""

    machine_code: MachineCode
    origins: dict[int, Origin]
    paths: Paths | None
    accesses: tuple[Access, ...]


# Launches of several cases share a kernel.
_known: dict[str, _Code] = {}


def _read(kernel: Any, *, disassemble: bool) -> _Code:
    if kernel.hash not in _known:
        code = machine_code(kernel, disassemble=disassemble)
        _known[kernel.hash] = _analysed(code) if code.instructions else _Code(code, {}, None, ())
    return _known[kernel.hash]


def _analysed(code: MachineCode) -> _Code:
    instructions = sass.parse(code.instructions)
    origins = read_origins(code.instructions)
    if not any(origins.values()):
        raise ValueError("the machine code has no line information; is TRITON_DISABLE_LINE_INFO set?")
    paths = read_paths(instructions, _regimes(origins))
    pointers = Pointers(code.ptx, code.signature)
    accesses: Counter[tuple[str, str, int]] = Counter()
    for instruction in instructions:
        if instruction.is_access and instruction.address in paths.reachable:
            names = pointers.of(instruction, origins.get(instruction.address, ()))
            pointer = " or ".join(sorted(names)) or "unknown"
            accesses[pointer, instruction.direction, instruction.access_bytes] += 1
    return _Code(
        code._replace(instructions="", ptx=""),
        origins,
        paths,
        tuple(Access(*access, count) for access, count in accesses.items()),
    )


def _measurement(
    case: CompiledCase, target: str, stage: str, name: str, launch: Launch, code: _Code
) -> KernelCounts:
    is_noise = case.operation == "multiply_noise"
    large = [name for name, tensor in launch.tensors.items() if tensor.numel() == case.elements]
    return KernelCounts(
        target=target,
        case=case.name,
        stage=stage,
        kernel=name,
        programs=launch.programs,
        num_warps=code.machine_code.num_warps,
        registers=code.machine_code.registers,
        shared_bytes=code.machine_code.shared_bytes,
        spills=code.machine_code.spills,
        accesses=code.accesses,
        activations=tuple(large) if is_noise else (),
        needs_wide_access=is_noise and case.allows_wide_access,
        paths=() if code.paths is None else _path_costs(case, launch, code, code.paths),
    )


def _regimes(origins: dict[int, Origin]) -> dict[int, str]:
    labels = {}
    for address, origin in origins.items():
        functions = set(function_names(origin))
        found = [label for function, label in REGIMES.items() if function in functions]
        if found:
            labels[address] = found[0]
    return labels


def _path_costs(case: CompiledCase, launch: Launch, code: _Code, paths: Paths) -> tuple[PathCost, ...]:
    trips = {
        loop: loop_trips(
            launch.kernel, launch.bound, [code.origins.get(address, ()) for address in addresses]
        )
        for loop, addresses in paths.loops.items()
    }
    num_warps = code.machine_code.num_warps
    has_regimes = any(path.labels for path in paths.paths)
    transferred = sum(tensor.numel() * tensor.itemsize for tensor in launch.tensors.values())
    costs = []
    for path in paths.paths:
        counts = path.total(trips)
        lanes_per_element = 32 * num_warps * launch.programs / case.elements
        instructions = dict.fromkeys(sass.CLASSES, 0.0)
        for kind, count in counts.items():
            instructions[kind.name] += count * lanes_per_element
        issue, unit, busy = _clocks(counts, num_warps, launch.programs)
        costs.append(
            PathCost(
                "+".join(sorted(path.labels)) or ("masked" if has_regimes else "all"),
                instructions,
                1e6 * issue / H100.clock_hz,
                unit,
                1e6 * busy / H100.clock_hz,
                1e6 * transferred / H100.copy_bytes_per_s,
            )
        )
    return tuple(costs)


def _clocks(counts: Counter[sass.Kind], num_warps: int, programs: int) -> tuple[float, str, float]:
    """Return the clocks in which the busiest multiprocessor issues, its busiest unit, and that unit's clocks."""
    warps = num_warps * math.ceil(programs / H100.multiprocessors)
    issue = counts.total() * math.ceil(warps / H100.schedulers)
    units = sass.unit_clocks(counts)
    unit = max(units, key=lambda name: units[name])
    return issue, unit, warps * units[unit]
