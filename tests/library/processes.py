"""Running a function in several processes that talk through gloo."""

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def run_in_processes(function, world, *arguments):
    """Return what ``function(*arguments)`` returns in each process of a group, in the order of their ranks."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, (world, folder, function, arguments), nprocs=world)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _run(rank, world, folder, function, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    try:
        torch.save(function(*arguments), Path(folder, f"{rank}.pt"))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
