"""Run a function in two gloo processes, for tests."""

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
