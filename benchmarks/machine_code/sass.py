"""NVIDIA's machine code as nvdisasm and cuobjdump print it: instructions and their kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
