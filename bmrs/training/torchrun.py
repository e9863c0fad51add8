"""A program that torchrun starts as several processes: how they meet and part, and which one reports a failure."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

# The others wait while the first process measures, however long that takes; torchrun ends them if it is gone.
_PATIENCE = timedelta(days=7)


class Team:
    """The processes that run the same program as this one.

    Args:
        store: what they share beside torch.distributed; None for a process that is alone.

    Attributes:
        interrupted: whether Ctrl-C or SIGTERM has arrived. Libraries may turn the KeyboardInterrupt into other errors.
    """

    def __init__(self, store: Any = None) -> None:
        self._store = store
        self.interrupted = False

    def interrupt(self, number: int, frame: object) -> None:
        """Raise KeyboardInterrupt, on a signal."""
        self.interrupted = True
        raise KeyboardInterrupt

    def interrupt_once(self, number: int, frame: object) -> None:
        """Raise KeyboardInterrupt, and ignore further signals: torchrun may send another one on."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        self.interrupt(number, frame)

    def failure(self, code: int) -> tuple[int, bool]:
        """Tell the others that this process ends early.

        From then on nothing is exchanged with them, and Ctrl-C and SIGTERM are ignored.

        Args:
            code: its exit code.

        Returns:
            The exit code of the process that failed first, and whether that is this one, which has to say why.
        """
        if self._store is None:
            return code, True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        own = f"{os.getenv('RANK')} {code}"
        try:
            first = self._store.compare_set("failure", "", own).decode()
        except RuntimeError:  # the store is gone, and with it the process that held it and failed before
            first = f"? {code}"
        from torch import distributed

        # Only now: once the others lose this process, they fail too.
        if distributed.group.WORLD is not None:
            distributed.group.WORLD.abort()
        return int(first.split()[1]), first == own


@contextmanager
def joined() -> Iterator[Team]:
    """Join the other processes if torchrun started several, and leave them at the end, also where that is an error.

    Tensors on GPUs are exchanged by NCCL, all others by gloo. All but the first process write nothing to stdout.
    SIGTERM is taken as Ctrl-C. If several processes fail, only the first one to do so
    raises what went wrong; the others end in silence with its exit code.
    """
    alone = Team()
    if not is_one_of_several():
        with _on_signals(alone.interrupt, signal.SIGINT, signal.SIGTERM):
            yield alone
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        with _on_signals(alone.interrupt, signal.SIGINT, signal.SIGTERM):
            yield alone
        return
    store, rank, world = next(rendezvous("env://"))
    on_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=_PATIENCE,
    )
    # None may leave, as it does at once after a bad option, while another is still connecting.
    distributed.all_reduce(torch.zeros(1))
    team = Team(distributed.PrefixStore("bmrs", store))
    try:
        with (
            _on_signals(team.interrupt_once, signal.SIGINT, signal.SIGTERM),
            open(os.devnull, "w") as nowhere,
        ):
            if rank == 0:
                yield team
            else:
                with redirect_stdout(nowhere):
                    yield team
    except BaseException:
        code, is_first = team.failure(1)
        if is_first:
            raise
        raise SystemExit(code) from None
    finally:
        distributed.destroy_process_group()


@contextmanager
def _on_signals(handle: Callable[[int, object], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone can have handlers
        yield
        return
    # A signal that is ignored, as Ctrl-C is by what a shell runs in the background, stays so.
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)


def is_one_of_several() -> bool:
    """Return whether torchrun started this process and others; variables of other launchers alone do not count."""
    return _started_by_torchrun() and int(os.getenv("WORLD_SIZE", "1")) > 1


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # as torch.distributed.is_torchelastic_launched, without torch


def other_launcher() -> str | None:
    """Return what to say where a launcher that is not torchrun has set up several processes, which train apart."""
    world = os.getenv("WORLD_SIZE", "1")
    if world == "1" or _started_by_torchrun():
        return None
    return f"WORLD_SIZE is {world}, but torchrun did not start this process, so that it trains alone"
