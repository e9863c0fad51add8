"""What the last bit of a run depends on beside its options, kept with it so that resuming elsewhere can say so."""

from __future__ import annotations

import platform
from typing import Any

import torch

from bmrs import processes


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device and numbers of threads and processes, as JSON values."""
    on_gpu = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
    }


def what_differs(before: Any, now: dict[str, Any]) -> str | None:
    """Return in a sentence what another environment means for a run that goes on in it; None if it is the same."""
    if not isinstance(before, dict):
        return None
    changes = [
        f"{name} {before[name]}, now {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]
    if not changes:
        return None
    threads = before.get("threads")
    hint = f" (OMP_NUM_THREADS={threads} sets threads)" if threads != now["threads"] else ""
    return (
        f"note: the run began with {', '.join(changes)}: it goes on, but need not end with bitwise the same weights"
        f"{hint}"
    )
