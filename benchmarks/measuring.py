"""What several scripts measure in the same way, and where they write it."""

import itertools
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

RESULTS = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """`cpu`, or the name of the GPU, as a part of a file name."""
    return re.sub(r"\W+", "_", torch.cuda.get_device_name() if device == "cuda" else "cpu").lower()


class Failures(list[str]):
    """What could not be measured. The rest is: time on a GPU is short."""

    @contextmanager
    def note(self, what: str) -> Iterator[None]:
        """Go on after an error in the body, which is printed."""
        try:
            yield
        except Exception:
            traceback.print_exc()
            self.append(what)

    def exit(self) -> None:
        """End the process; its status says whether anything failed."""
        raise SystemExit("not measured: " + ", ".join(self) if self else 0)


def timed(run: Callable[..., Any], *args: Any, device: str = "cpu") -> tuple[float, Any]:
    """Seconds of a call, and its result. On a CPU they are this process's own, so that others do not count."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = run(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def gflops(run: Callable[[], object]) -> float:
    """Operations of a call in 10⁹, two for each multiplication and addition."""
    # torch 2.11 cannot count products with an `out_dtype`, nor the CPU's fused attention.
    products = {torch.ops.aten.bmm: lambda x, y, *_, **__: bmm_flop(x, y)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=products) as counter:
        run()
    return counter.get_total_flops() / 1e9


def peak_bytes(run: Callable[..., Any], *args: Any, device: str = "cpu") -> tuple[int, Any]:
    """Most bytes of tensors that a call holds at any time, beyond those held before it, and its result."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run(*args)
        return torch.cuda.max_memory_allocated() - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run(*args)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0), result
