"""The correlation op against alternatives, as ratios to the GEMM that all of them need.

    python benchmarks/correlation.py                              # CPU, float32, one thread
    python benchmarks/correlation.py --against 783f026            # and the op of that commit, in the same process
    python benchmarks/correlation.py --device cuda --seconds 120  # GPU: bfloat16, float32, float16; then tune constants

A forward is held against one GEMM of the same size and dtype, a forward with its backward against three. On a CPU every
round times every method once, as process time, and divides by that round's GEMM. On a GPU `bench` times calls as a user
makes them and `graph` their CUDA graph, which has no launches. `volumes` is the peak of memory beyond inputs and
results, in float32 volumes (B, N, M). `error` is the largest difference to the float64 reference of 256 points: of
positions in cells, and of gradients of their features relative to the largest.

Methods: `eager` (the kernel soft-argmax as SFNet writes it, the plain one as CATs does), `compile` (torch.compile of
it), `corrzoo` (ours), `learned` (with a temperature that has a gradient), `before` (the op of `--against`).
"""

import argparse
import importlib
import io
import itertools
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo import ops
from corrzoo.ops import reference, strips
from corrzoo.tables import write_csv
from measuring import RESULTS, Failures, device_name, peak_bytes, timed

C, TEMPERATURE, SIGMA = 768, 0.02, 7.0
CPU_CASES = [("float32", 16, 16), ("float32", 32, 4), ("float32", 64, 1), ("float32", 128, 1)]
GPU_CASES = [
    *(("bfloat16", side, B) for side, B in ((64, 4), (32, 8), (16, 32), (128, 1))),
    *(("float32", side, B) for side, B in ((64, 4), (32, 8))),
    ("float16", 64, 4),
]
"""(dtype, side of the grid, batch)."""
WINDOWS = {"plain": "none", "kernel": "argmax", "crop": "crop"}
Method = Callable[[Tensor, Tensor, int], tuple[Tensor, list[Tensor]]]
"""Positions of source features in a target, and parameters that have a gradient."""


def scores_of(src: Tensor, trg: Tensor) -> Tensor:
    return F.normalize(src, dim=-1) @ F.normalize(trg, dim=-1).mT


def eager_plain(src: Tensor, trg: Tensor, side: int) -> tuple[Tensor, list[Tensor]]:
    """CATs: softmax over the cells, then the means of the two marginals."""
    p = (scores_of(src, trg).float() / TEMPERATURE).softmax(-1).unflatten(-1, (side, side))
    axis = torch.arange(side, device=src.device, dtype=torch.float32) + 0.5
    return torch.stack([(p.sum(2) * axis).sum(-1), (p.sum(3) * axis).sum(-1)], -1), []


def eager_kernel(src: Tensor, trg: Tensor, side: int) -> tuple[Tensor, list[Tensor]]:
    """SFNet: a Gaussian around the row's argmax, times the scores, softmax, expectation."""
    s = scores_of(src, trg).float()
    best = s.detach().argmax(-1, keepdim=True)
    cells = torch.arange(side * side, device=s.device)
    dx, dy = cells % side - best % side, cells // side - best // side
    p = (torch.exp(-(dx**2 + dy**2) / (2 * SIGMA**2)) * s / TEMPERATURE).softmax(-1)
    return torch.stack([(p * (cells % side + 0.5)).sum(-1), (p * (cells // side + 0.5)).sum(-1)], -1), []


def ours(window: str, module: ModuleType = ops, learned: bool = False) -> Method:
    def method(src: Tensor, trg: Tensor, side: int) -> tuple[Tensor, list[Tensor]]:
        T = torch.full((), TEMPERATURE, device=src.device, requires_grad=True) if learned else TEMPERATURE
        xy = module.match(src, trg, (side, side), T, WINDOWS[window], sigma=SIGMA, radius=3).xy
        return xy, [T] if isinstance(T, Tensor) else []

    return method


def methods(window: str, before: ModuleType | None) -> dict[str, Method]:
    eager = {"plain": eager_plain, "kernel": eager_kernel}.get(window)
    found: dict[str, Method] = {"corrzoo": ours(window), "learned": ours(window, learned=True)}
    if before is not None:
        found["before"] = ours(window, before, learned=True)
    if eager is not None:
        found |= {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    return found


def at_commit(commit: str) -> ModuleType:
    """The ops of a commit of this repository, under another package's name and another name for torch operators."""
    root, folder = Path(__file__).parents[1], Path(tempfile.mkdtemp())
    archive = subprocess.run(["git", "-C", root, "archive", commit, "src/corrzoo"], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    (folder / "src/corrzoo").rename(folder / "corrzoo_before")
    for path in (folder / "corrzoo_before").rglob("*.py"):
        path.write_text(path.read_text().replace("corrzoo", "corrzoo_before"))
    sys.path.insert(0, str(folder))
    return importlib.import_module("corrzoo_before.ops")


def gemms(src: Tensor, trg: Tensor, backward: bool) -> None:
    """One GEMM, or the three that forward and backward need."""
    s = src @ trg.mT
    if backward:
        _ = s @ trg, s.mT @ src


def once(method: Method, src: Tensor, trg: Tensor, side: int, backward: bool) -> list[Tensor]:
    """One call; its results."""
    if not backward:
        with torch.no_grad():
            return [method(src, trg, side)[0]]
    xy, parameters = method(src, trg, side)
    return [xy.detach(), *torch.autograd.grad(xy, (src, trg, *parameters), torch.ones_like(xy))]


def bytes_beyond(call: Callable[[], list[Tensor]], device: str) -> int:
    """Most bytes that a call holds at any time, beyond what was there before and what it returns."""
    peak, results = peak_bytes(call, device=device)
    return max(0, peak - sum(x.nbytes for x in results))


def errors(results: list[Tensor], src: Tensor, trg: Tensor, side: int, window: str) -> tuple[float, float]:
    f, g = src[:1, :256].detach().double().requires_grad_(), trg[:1].detach().double()
    scores = reference.correlation(f, g)
    xy = reference.readout(scores, (side, side), TEMPERATURE, WINDOWS[window], SIGMA, 3).xy
    position = (results[0][:1, :256] - xy).abs().max().item()
    if len(results) == 1:
        return position, 0.0
    (exact,) = torch.autograd.grad(xy.sum(), f)
    return position, ((results[1][:1, :256] - exact).abs().max() / exact.abs().max()).item()


def cpu_ratios(calls: dict[str, Callable[[], object]], gemm: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Process time of every call in every round, over that round's GEMM; the order changes from round to round."""
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds):
        floor, names = timed(gemm)[0], list(calls)
        for name in names if k % 2 else names[::-1]:
            ratios[name].append(timed(calls[name])[0] / floor)
    return ratios


def gpu_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=25, return_mode="median")


def graph_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a CUDA graph of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    ms = gpu_ms(graph.replay)
    del kept
    return ms


def measure(
    case: tuple[str, int, int], window: str, backward: bool, names: list[str], args: argparse.Namespace
) -> list[dict[str, object]]:
    """A row for each method."""
    torch.compiler.reset()  # after eight sizes it would compile no more
    dtype, side, B = case
    src, trg = (
        torch.randn(B, side**2, C, device=args.device, dtype=getattr(torch, dtype)).requires_grad_(backward)
        for _ in range(2)
    )
    known = methods(window, args.before)
    calls = {k: lambda k=k: once(known[k], src, trg, side, backward) for k in names if k in known}
    rows = {}
    for name, call in calls.items():
        error = errors(call(), src, trg, side, window)  # the first call compiles
        volumes = bytes_beyond(call, args.device) / (B * side**4 * 4)
        rows[name] = {"dtype": dtype, "grid": side, "batch": B, "window": window, "pass": "f+b" if backward else "f"}
        rows[name] |= {"method": name, "volumes": f"{volumes:.3f}"}
        rows[name] |= {"error": f"{error[0]:.1e}", "gradient_error": f"{error[1]:.1e}"}

    def gemm() -> None:
        gemms(src.detach(), trg.detach(), backward)

    if args.device == "cpu":
        for name, ratios in cpu_ratios(calls, gemm, args.rounds if side < 128 else 3).items():
            rows[name]["ratio"] = f"{statistics.median(ratios):.3f}"
    else:
        bench, graph = gpu_ms(gemm), graph_ms(gemm)
        for name, call in calls.items():
            rows[name] |= {"gemm_us": f"{graph * 1e3:.0f}", "ratio": f"{gpu_ms(call) / bench:.2f}"}
            rows[name]["graph_ratio"] = f"{graph_ms(call) / graph:.2f}"
    for row in rows.values():
        row |= {"device": args.name, "torch": torch.__version__}
        print(" ".join(f"{k}={v}" if k not in ("device", "torch") else "" for k, v in row.items()), flush=True)
    return list(rows.values())


def tune(args: argparse.Namespace, end: float, failures: Failures) -> None:
    """Ratios to the GEMM, in CUDA graphs, for values of the op's constants; the defaults are in the first row."""
    from corrzoo.ops import kernels

    rows: list[dict[str, object]] = []

    def attempt(side: int, B: int, backward: bool, **constants: object) -> None:
        if time.time() > end:
            return
        src, trg = (torch.randn(B, side**2, C, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        floor = graph_ms(lambda: gemms(src, trg, backward))
        owners = {name: strips if hasattr(strips, name) else kernels for name in constants}
        src.requires_grad_(backward), trg.requires_grad_(backward)
        row = {"grid": side, "batch": B, "pass": "f+b" if backward else "f", **constants}
        with failures.note(f"tune {row}"), ExitStack() as stack:
            for name, owner in owners.items():
                stack.enter_context(mock.patch.object(owner, name, constants[name]))
            ratio = graph_ms(lambda: once(ours("kernel"), src, trg, side, backward)) / floor
            rows.append(row | {"ratio": f"{ratio:.2f}"})
            print("tune", *(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
            write(rows, args.out / "correlation_tuned.csv")

    MB = 2**20
    for side, B in ((64, 4), (32, 8), (16, 32), (128, 1)):
        for per_thread in (32, 16, 64):
            for elements in (1024, 2048, 4096) if side < 64 else (1024,):
                for backward in (False, True):
                    attempt(side, B, backward, PER_THREAD=per_thread, ELEMENTS=elements)
    for side, B in ((64, 4), (128, 1)):
        for whole, strip in ((256, 64), (32, 32), (32, 16), (1024, 64), (128, 128)):
            attempt(side, B, False, WHOLE=whole * MB, STRIP=strip * MB)
            attempt(side, B, True, WHOLE=whole * MB, STRIP=strip * MB)
        for keep in (0, 64, 256, 1024):
            attempt(side, B, True, KEEP=keep * MB, KEEP_HALF=0)
    for rows_, channels, warps in ((16, 128, 4), (8, 128, 4), (16, 64, 4), (16, 256, 8), (4, 256, 4)):
        for side, B in ((64, 4), (16, 32)):
            attempt(side, B, True, FEATURES={"R": rows_, "TILE_C": channels, "num_warps": warps})


def write(rows: list[dict[str, object]], path: Path) -> None:
    write_csv(path, rows, list(dict.fromkeys(k for row in rows for k in row)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--grids", type=int, nargs="+", help="sides; default: 16 32 64 128")
    parser.add_argument("--windows", nargs="+", default=["plain", "kernel"], choices=list(WINDOWS))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=8, help="on a CPU; 3 at 128²")
    parser.add_argument("--seconds", type=float, default=120, help="on a GPU: start nothing new after so many")
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    args = parser.parse_args()
    start, failures = time.time(), Failures()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args.before = at_commit(args.against) if args.against else None
    args.name = torch.cuda.get_device_name() if args.device == "cuda" else f"{processor()}, 1 thread"
    passes: list[list[str]] = [["corrzoo", "learned", "before", "eager", "compile"]]
    if args.device == "cuda":  # what is compiled comes last: it takes the most time
        passes = [["corrzoo", "learned", "before"], ["eager"], ["compile"]]
    rows: list[dict[str, object]] = []
    for k, names in enumerate(passes):
        for case in CPU_CASES if args.device == "cpu" else GPU_CASES:
            for window, backward in itertools.product(args.windows, (False, True)):
                late = args.device == "cuda" and time.time() - start > args.seconds
                if late or (args.grids and case[1] not in args.grids):
                    continue
                wanted = [name for name in names if not args.methods or name in args.methods]
                if case[1] == 128 and args.device == "cpu":  # a GEMM takes seconds, and eager methods gigabytes
                    wanted = [name for name in wanted if name not in ("eager", "compile")]
                if wanted:
                    with failures.note(f"{wanted} {case} {window}"):
                        rows += measure(case, window, backward, wanted, args)
                        write(rows, args.out / f"correlation_{device_name(args.device)}.csv")
        if args.device == "cuda" and k == 0:
            tune(args, start + 0.75 * args.seconds, failures)
    failures.exit()


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else platform.machine()


if __name__ == "__main__":
    main()
