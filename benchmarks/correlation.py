"""The correlation op against alternatives, as ratios to the GEMM that all of them need.

Every round times every method once, one after the other, and divides by that round's GEMM: a machine that others use
too slows both. Forward is held against one GEMM, forward+backward against three. Memory is the peak beyond inputs and
results, in float32 volumes (B, N, M).

    python benchmarks/correlation.py --threads 1                    # CPU, float32
    python benchmarks/correlation.py --device cuda --dtype bfloat16

writes results/correlation_<device>.csv and .png beside this file. Methods: `gemm` (the floor), `eager` (the kernel
soft-argmax as SFNet writes it, the plain one as CATs does), `compile` (torch.compile of it), `sdpa` (attention with
coordinates as values, plain only), `flex` (FlexAttention; the Gaussian in its score_mod, after an argmax pass of its
own; forward only on a CPU), `corrzoo` (ours) and `corrzoo-recompute` (ours, keeping nothing for the backward).
"""

import argparse
import csv
import itertools
import platform
import re
import statistics
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from corrzoo import ops

C, TEMPERATURE, SIGMA = 768, 0.02, 7.0
BATCH = {16: 16, 32: 4, 64: 1, 128: 1}
Method = Callable[[Tensor, Tensor, int], Tensor]


def scores_of(src: Tensor, trg: Tensor) -> Tensor:
    return F.normalize(src, dim=-1) @ F.normalize(trg, dim=-1).mT


def axis(side: int, like: Tensor) -> Tensor:
    return torch.arange(side, device=like.device, dtype=torch.float32) + 0.5


def eager_plain(src: Tensor, trg: Tensor, side: int) -> Tensor:
    """CATs: softmax over the cells, then the means of the two marginals."""
    p = (scores_of(src, trg).float() / TEMPERATURE).softmax(-1).unflatten(-1, (side, side))
    x, y = p.sum(2), p.sum(3)
    return torch.stack([(x * axis(side, x)).sum(-1), (y * axis(side, y)).sum(-1)], -1)


def eager_kernel(src: Tensor, trg: Tensor, side: int) -> Tensor:
    """SFNet: a Gaussian around the row's argmax, times the scores, softmax, expectation."""
    s = scores_of(src, trg).float()
    best = s.detach().argmax(-1, keepdim=True)
    cells = torch.arange(side * side, device=s.device)
    dx, dy = cells % side - best % side, cells // side - best // side
    p = (torch.exp(-(dx**2 + dy**2) / (2 * SIGMA**2)) * s / TEMPERATURE).softmax(-1)
    return torch.stack([(p * (cells % side + 0.5)).sum(-1), (p * (cells // side + 0.5)).sum(-1)], -1)


def coordinates(trg: Tensor, side: int) -> Tensor:
    y, x = torch.meshgrid(axis(side, trg), axis(side, trg), indexing="ij")
    xy = torch.stack([x, y], -1).flatten(0, 1).to(trg.dtype)
    return F.pad(xy, (0, trg.shape[2] - 2 if trg.is_cuda else 0)).expand(trg.shape[0], 1, -1, -1)


def sdpa_plain(src: Tensor, trg: Tensor, side: int) -> Tensor:
    f, g = F.normalize(src, dim=-1).unsqueeze(1), F.normalize(trg, dim=-1).unsqueeze(1)
    return F.scaled_dot_product_attention(f, g, coordinates(trg, side), scale=1 / TEMPERATURE)[:, 0, :, :2]


def flex_plain(src: Tensor, trg: Tensor, side: int) -> Tensor:
    f, g = F.normalize(src, dim=-1).unsqueeze(1), F.normalize(trg, dim=-1).unsqueeze(1)
    return compiled_flex(f, g, F.pad(coordinates(trg, side), (0, 14)), scale=1 / TEMPERATURE)[:, 0, :, :2]


def flex_kernel(src: Tensor, trg: Tensor, side: int) -> Tensor:
    f, g = F.normalize(src, dim=-1), F.normalize(trg, dim=-1)
    best = torch.cat([(rows @ g.mT).argmax(-1) for rows in f.detach().split(512, 1)], 1)

    def window(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dx, dy = j % side - best[b, i] % side, j // side - best[b, i] // side
        return score * torch.exp(-(dx * dx + dy * dy) / (2 * SIGMA**2))

    values = F.pad(coordinates(trg, side), (0, 14))
    return compiled_flex(f.unsqueeze(1), g.unsqueeze(1), values, score_mod=window, scale=1 / TEMPERATURE)[:, 0, :, :2]


def ours(window: str, **options: object) -> Method:
    def method(src: Tensor, trg: Tensor, side: int) -> Tensor:
        return ops.match(src, trg, (side, side), TEMPERATURE, window=window, sigma=SIGMA, **options).xy

    return method


compiled_flex = torch.compile(flex_attention, dynamic=False)
METHODS: dict[str, dict[str, Method]] = {
    "plain": {
        "eager": eager_plain,
        "compile": torch.compile(eager_plain, dynamic=False),
        "sdpa": sdpa_plain,
        "flex": flex_plain,
        "corrzoo": ours("none"),
        "corrzoo-recompute": ours("none", recompute=True),
    },
    "kernel": {
        "eager": eager_kernel,
        "compile": torch.compile(eager_kernel, dynamic=False),
        "flex": flex_kernel,
        "corrzoo": ours("argmax"),
        "corrzoo-recompute": ours("argmax", recompute=True),
    },
}


def gemms(src: Tensor, trg: Tensor, backward: bool) -> None:
    """One GEMM, or the three that forward and backward need."""
    s = src @ trg.mT
    if backward:
        _ = s @ trg, s.mT @ src


def once(method: Method, src: Tensor, trg: Tensor, side: int, backward: bool) -> list[Tensor]:
    """Call a method once. Its results must be kept until memory is read."""
    if not backward:
        with torch.no_grad():
            return [method(src, trg, side)]
    xy = method(src.requires_grad_(), trg.requires_grad_(), side)
    return [xy.detach(), *torch.autograd.grad(xy, (src, trg), torch.ones_like(xy))]


def seconds(call: Callable[[], object], device: str) -> float:
    """Seconds of a call: wall time on a GPU, CPU time of the process on a CPU."""
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], list[Tensor]], device: str) -> int:
    """Peak memory of a call in bytes, without memory in use before and without its results."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        peak = torch.cuda.max_memory_allocated()
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = call()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
        before, peak = 0, max(held, default=0)
    return max(0, peak - before - sum(x.nbytes for x in results))


def measure(side: int, window: str, backward: bool, args: argparse.Namespace) -> list[dict[str, object]]:
    B, dtype = BATCH[side], getattr(torch, args.dtype)
    src, trg = (torch.randn(B, side**2, C, device=args.device, dtype=dtype) for _ in range(2))
    methods = {k: m for k, m in METHODS[window].items() if not args.methods or k in args.methods}
    if args.device == "cpu":
        left_out = {"flex"} if backward else set()  # FlexAttention has no backward on a CPU
        if side == 128:  # a GEMM takes seconds, and the eager kernel 12 GB
            left_out |= {"compile", "flex", "corrzoo-recompute"} | ({"eager"} if window == "kernel" else set())
        methods = {k: m for k, m in methods.items() if k not in left_out}
    calls = {k: lambda m=m: once(m, src, trg, side, backward) for k, m in methods.items()}
    memory = {}
    for name, call in calls.items():
        call()  # compiles, and fills caches
        memory[name] = peak_bytes(call, args.device) / (B * side**4 * 4)
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    floors = []
    for _ in range(max(1, args.rounds if side < 128 else args.rounds // 4)):
        floors.append(seconds(lambda: gemms(src.detach(), trg.detach(), backward), args.device))
        for name, call in calls.items():
            ratios[name].append(seconds(call, args.device) / floors[-1])
    rows = []
    for name, values in ratios.items():
        row = {"grid": side, "batch": B, "window": window, "pass": "f+b" if backward else "f", "method": name}
        row |= {"ratio": f"{statistics.median(values):.3f}", "low": f"{min(values):.3f}", "high": f"{max(values):.3f}"}
        row |= {"volumes": f"{memory[name]:.3f}", "gemm_ms": f"{statistics.median(floors) * 1e3:.2f}"}
        row |= {"rounds": len(floors), "dtype": args.dtype, "device": args.name, "torch": torch.__version__}
        print(" ".join(f"{v}" for v in row.values()), flush=True)
        rows.append(row)
    return rows


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib.pyplot as plt

    kinds = [(window, done) for window in METHODS for done in ("f", "f+b")]
    figure, panels = plt.subplots(1, len(kinds), figsize=(14, 3.6), sharey=True)
    for (window, done), panel in zip(kinds, panels, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            line = [r for r in rows if (r["window"], r["pass"], r["method"]) == (window, done, method)]
            if line:
                panel.plot([str(r["grid"]) for r in line], [float(r["ratio"]) for r in line], marker="o", label=method)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(
            title=f"{window}, {done}", xlabel="grid side", ylabel="time / GEMM" if done == "f" else "time / 3 GEMMs"
        )
        panel.set_ylim(0.8, 5)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--grids", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=8, help="rounds; a quarter of them at 128²")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, help="output folder of the CSV and the plot")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.name = torch.cuda.get_device_name() if args.device == "cuda" else f"{processor()}, {args.threads} thread(s)"
    rows = []
    for side in args.grids:
        for window in METHODS:
            for backward in (False, True):
                rows += measure(side, window, backward, args)
    out = args.out or Path(__file__).parent / "results"
    stem = re.sub(r"\W+", "_", torch.cuda.get_device_name() if args.device == "cuda" else "cpu").lower()
    path = out / f"correlation_{stem}.csv"
    if path.exists():  # what was not measured now keeps its rows
        key = itemgetter("grid", "window", "pass", "method")
        now = {tuple(map(str, key(row))) for row in rows}
        kept = [row for row in csv.DictReader(path.open()) if key(row) not in now]
        rows = sorted(kept + rows, key=lambda row: int(row["grid"]))
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    plot(rows, out / f"correlation_{stem}.png")


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else platform.machine()


if __name__ == "__main__":
    main()
