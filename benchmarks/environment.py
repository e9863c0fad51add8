"""The machine, the versions and the commit, which every committed result records."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import processes


def environment(commit: str | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the machine, the versions, the commit and the date.

    Args:
        commit: what is measured, where git cannot tell.
        device: what it runs on; a GPU is described with its driver.
    """
    machine = gpu() if torch.device(device).type == "cuda" else cpu()
    return {
        **machine,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numba": version_of("numba"),
        "numpy": version_of("numpy"),
        "python": platform.python_version(),
        "commit": commit or git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu() -> dict[str, Any]:
    """Return the processor and how much of it there is."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            model = found[1].strip()
    return {"CPU": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def gpu() -> dict[str, Any]:
    """Return the current GPU and its driver."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "GPU": properties.name,
        "GPU memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "multiprocessors": properties.multi_processor_count,
        "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA": torch.version.cuda,
    }


def version_of(package: str) -> str:
    """Return the version of an installed package, "none" if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def git_commit() -> str:
    """Return the commit of the working tree, with a mark if files differ from it."""
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return commit if "unknown" in (commit, changed) or not changed else f"{commit} with changes"


def output_of(*command: str) -> str:
    """Return the first line that a program prints, "unknown" if it cannot be run."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        finished = subprocess.run(
            command, cwd=processes.ROOT, capture_output=True, text=True, timeout=20, check=True
        )
        return finished.stdout.partition("\n")[0].strip()
    return "unknown"


def one_line(about: dict[str, Any]) -> str:
    """Return a sentence for the head of a report."""
    return ", ".join(f"{name} {value}" for name, value in about.items()) + "."
