"""Runs a function in several processes at once, and makes a hang a failure."""

import os
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

SLOW_IMPORTS = [
    "bmrs.public",
    "bmrs.training.public",
    "numba",
    "pytest",
    "torch._dynamo",
    "torch._functorch.partitioners",
]


def run_together(function, *arguments, world, timeout=100):
    """Call ``function(rank, *arguments)`` in several processes, with the environment that torchrun gives them."""
    # They are forked from a process that has nothing but imported what they need, which takes longest.
    multiprocessing.set_forkserver_preload(SLOW_IMPORTS)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.start_processes(
        _call,
        (function, world, store.port, arguments),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"{function.__name__} hangs"
    finally:
        for process in context.processes:
            process.kill()


def results_together(function, *arguments, world, timeout=100):
    """Return what ``function(*arguments)`` returns in each of several processes that talk through gloo, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        run_together(_save_result, function, arguments, folder, world=world, timeout=timeout)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _save_result(rank, function, arguments, folder):
    distributed.init_process_group("gloo")
    try:
        torch.save(function(*arguments), Path(folder, f"{rank}.pt"))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _call(rank, function, world, port, arguments):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    function(rank, *arguments)
