"""Compilation of launches for GPUs that this machine need not have."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.machine_code.cases import Launch

NVIDIA_TARGETS = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA_TARGETS, "gfx942")


class MachineCode(NamedTuple):
    """A kernel's machine code and what it needs."""

    num_warps: int
    shared_bytes: int
    registers: int
    spills: str  # empty if there are none
    instructions: str = ""  # as nvdisasm prints them with line information, for NVIDIA's GPUs
    ptx: str = ""
    signature: Mapping[str, str] = MappingProxyType({})  # Triton's types of the parameters, by name


def gpu_target(name: str) -> Any:
    """Return Triton's description of a GPU such as sm_90 or gfx942."""
    from triton.backends.compiler import GPUTarget

    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


class _Driver:
    """What Triton asks its driver for to compile a launch."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        # A kernel keeps what it compiled by device, so that this must be the name of no real one.
        return f"{self.target.backend}-{self.target.arch}"

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Have Triton compile for a target that this machine need not have."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(gpu_target(target)))
    try:
        yield
    finally:
        driver._active = before


def compiled(launch: Launch) -> Any:
    """Compile a launch as Triton would when it is started, inside ``compiling_for``; return Triton's result."""
    from triton.runtime import driver

    options = dict(launch.options)
    if driver.active.get_current_target().backend == "hip":
        options.pop("maxnreg", None)  # what `launch` does on such a GPU
    return launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **options)


def machine_code(kernel: Any, *, disassemble: bool) -> MachineCode:
    """Read what Triton compiled: what the kernel needs, and if ``disassemble`` its instructions."""
    return _read_cubin(kernel, disassemble=disassemble) if "cubin" in kernel.asm else _read_amdgcn(kernel)


def _read_cubin(kernel: Any, *, disassemble: bool) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", file)
        # cuobjdump -sass runs nvdisasm too, but without the lines of the source. No dataflow analysis: it finds where
        # indirect branches lead, which kernels have none of, and takes a quarter of the time.
        instructions = _output("nvdisasm", "-ndf", "-c", "-gi", file) if disassemble else ""
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    accesses = len(re.findall(r"\s(?:LDL|STL)\b", instructions))
    stack = numbers["STACK"] + numbers["LOCAL"]
    return MachineCode(
        kernel.metadata.num_warps,
        numbers["SHARED"],
        numbers["REG"],
        (f"{stack} B" + f", {accesses} accesses" * disassemble) if stack or accesses else "",
        instructions,
        kernel.asm["ptx"],
        kernel.src.signature,
    )


def _read_amdgcn(kernel: Any) -> MachineCode:
    numbers = {
        name: int(value)
        for name, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", kernel.asm["amdgcn"], re.MULTILINE)
    }
    # Scalar registers spill to vector registers first, which costs no memory.
    return MachineCode(
        kernel.metadata.num_warps,
        numbers.get("group_segment_fixed_size", 0),
        numbers["vgpr_count"],
        f"{numbers['private_segment_fixed_size']} B" if numbers.get("private_segment_fixed_size") else "",
    )


def _output(tool: str, *arguments: str | Path) -> str:
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    found = str(shipped) if shipped.is_file() else shutil.which(tool)
    if found is None:
        raise FileNotFoundError(f"{tool} is neither in the Triton package nor on the path")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout
