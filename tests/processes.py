"""Run a function in two gloo processes, or as a user who is not root, for tests."""

import ctypes
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work: Callable[[int, str], None], folder: Path) -> list[Any]:
    """Run `work(rank, folder)` in two new processes and return their results.

    The test process joins no process group: after a failed test, every later mean over processes would wait for it.

    Raises:
        torch.multiprocessing.ProcessRaisedException: if a process raised; the other is ended.
    """
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def join(rank: int, folder: str) -> None:
    """Join the process group. The first line of `work`."""
    torch.set_num_threads(1)
    limit = timedelta(minutes=10)  # for a busy machine
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)


def leave(found: Any, rank: int, folder: str) -> None:
    """Store a result for `in_two_processes`. The last line of `work`."""
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def obey_permissions() -> None:
    """Make root obey permissions, too: drop CAP_DAC_OVERRIDE (capabilities(7))."""
    libc, override = ctypes.CDLL(None, use_errno=True), 1 << 1
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for which in range(3):  # effective, permitted, inheritable
        sets[which] &= ~override
    assert libc.capset(header, sets) == 0
