"""Work that two gloo processes do together, for tests."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work: Callable[[int, str], None], folder: Path) -> list[Any]:
    """What `work(rank, folder)` leaves in each of two new processes.

    Neither is the tests' own: a group that a failed test left open there would hold up every later mean over processes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what a process raised; the other is ended.
    """
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def join(rank: int, folder: str) -> None:
    """The work's first line: become one of the two."""
    torch.set_num_threads(1)
    limit = timedelta(minutes=10)  # of a machine with much else to do
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)


def leave(found: Any, rank: int, folder: str) -> None:
    """The work's last line: what it has found, for `in_two_processes`."""
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
