"""Cost of a head: forward and training step as ratios to its backbone alone, parameters, FLOPs, peak memory.

Head and backbone are timed in turns, and a ratio is the median over the rounds. With `--rounds 0` nothing is timed, and
parameters and FLOPs are counted. With `--compile`, the model is measured once more, compiled as `--model.compile true`
does. On a GPU, `host_syncs` counts how often a training step waits for the device. Adds its rows to
benchmarks/results/step_<device>.csv. Run `python benchmarks/step.py --heads ACTR LPMFlow`.
"""

import argparse
import csv
import gc
import json
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from corrzoo.callbacks.compiling import compile_matcher
from corrzoo.heads import HEADS
from corrzoo.tables import write_csv
from corrzoo.types import Pair, ZooError
from measuring import RESULTS, Failures, device_name, gflops, timed

OPTIONS: dict[str, dict[str, Any]] = {
    "ACTR": {"backbone_size": 256, "optimizer": "adamw"},
    "LPMFlow": {"backbone_size": 256, "optimizer": "adamw"},
    "GeoAware": {"grid": 16, "optimizer": "adamw"},
    "CATs": {"levels": [*range(12)], "optimizer": "adamw"},
    "TransforMatcher": {"levels": [*range(12)]},
    "MirrorGuided": {"stride": 16, "layers": 2, "epe_weight": 0.0, "row_weight": 1.0, "optimizer": "adamw"},
}
"""Options of the paper's model that differ from the defaults; a CNN of stride 32 has the same 256 px input."""
CONFIGS = Path(__file__).resolve().parents[1] / "zoo_configs"

KEY = ("head", "backbone", "size", "batch", "precision", "compiled")
"""What tells the rows of the table apart."""


def options_of(head: str, backbone: str) -> dict[str, Any]:
    """The head's options; its levels are those of its recipe, if the backbone is."""
    recipe = yaml.safe_load((CONFIGS / f"{head.lower()}.yaml").read_text())["model"]["init_args"]
    levels = {"levels": recipe.get("levels")} if recipe["backbone"] == backbone else {}
    return OPTIONS.get(head, {}) | levels


def pairs(count: int, size: int, device: str) -> Pair:
    """Random images with ten keypoints each."""
    images = [torch.randn(count, 3, size, size, device=device) for _ in range(2)]
    kps = [torch.rand(count, 10, 2, device=device) * size for _ in range(2)]
    sizes, boxes = torch.full((count, 2), float(size)), torch.full((count, 4), torch.nan)
    number = torch.arange(count)
    rest = [sizes, sizes, boxes, boxes, number, number, number, number, number.new_zeros(count, 4)]
    rest += [torch.ones(count, 1, 1)] * 2 + [number.new_full((count, 10), -1)] * 2  # no outlines, no names of parts
    mask = torch.ones(count, 10, dtype=torch.bool, device=device)
    return Pair(*images, *kps, mask, *(field.to(device) for field in rest))


def measure(
    head: str, backbone: str, precisions: list[str], compiled: bool, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row of the table for each precision."""
    torch.set_num_threads(args.threads)
    # On a GPU, the process has measured other heads. torch compiles a method at most eight times.
    torch.compiler.reset()
    gc.collect()
    return [measure_precision(head, backbone, precision, compiled, args) for precision in precisions]


def measure_precision(
    head: str, backbone: str, precision: str, compiled: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    bf16 = precision == "bf16"
    options = options_of(head, backbone) | args.options
    # Not `create_matcher`: it checks options by jsonargparse, which a GPU machine may lack.
    model = HEADS[head](backbone=backbone, weights="random", **options).load_weights().to(args.device)
    pair = pairs(args.batch, args.size, args.device)
    both = torch.cat([pair.src_img, pair.trg_img])

    def features(image: Tensor) -> Tensor:
        return sum((level.square().mean() for level in model.backbone(image).maps), torch.zeros((), device=args.device))

    def loss() -> Tensor:
        terms = model.training_losses(pair)
        return terms["loss"] if isinstance(terms, dict) else terms

    def stepping(objective: Callable[[], Tensor], parameters: Any) -> Callable[[], None]:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[model.hparams.optimizer]
        optimizer = kind(list(parameters), lr=1e-6)

        def step() -> None:
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                value = objective()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def forward(run: Callable[[], object]) -> Callable[[], None]:
        def evaluate() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                run()

        return evaluate

    row: dict[str, Any] = {"head": head, "backbone": backbone, "size": args.size, "batch": args.batch}
    row |= {"precision": precision, "compiled": compiled}
    total = sum(p.numel() for p in model.parameters())
    row |= {"params_head_m": total - model.backbone.num_params, "params_total_m": total}
    row |= {key: round(row[key] / 1e6, 3) for key in ("params_head_m", "params_total_m")}
    model.eval()
    runs = {"forward": (forward(lambda: features(both)), forward(lambda: model(pair.src_img, pair.trg_img)))}
    for key, run in zip(("gflops_backbone", "gflops"), runs["forward"], strict=True):
        row[key] = round(gflops(run) / args.batch, 1)  # of a pair
    if not args.rounds:
        return row
    if compiled:
        compile_matcher(model, graphs=args.device == "cuda")
    row |= ratios("forward", *runs["forward"], args)
    model.train()
    if compiled:
        compile_matcher(model)
    in_backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    alone = stepping(lambda: features(both), in_backbone) if in_backbone else runs["forward"][0]
    whole = stepping(loss, (p for p in model.parameters() if p.requires_grad))
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row |= ratios("step", alone, whole, args)
    if args.device == "cuda":
        row |= {"host_syncs": host_syncs(whole), "peak_mb": torch.cuda.max_memory_allocated() // 2**20}
    else:
        row |= {"host_syncs": "", "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10}
    return row | {"threads": args.threads, "torch": torch.__version__}


def host_syncs(step: Callable[[], None]) -> int:
    """How often a training step waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


def ratios(
    name: str, alone: Callable[[], None], whole: Callable[[], None], args: argparse.Namespace
) -> dict[str, float]:
    """Time of the backbone in ms, and of the whole model as a multiple: median, lowest, highest."""
    for _ in range(3 if args.device == "cuda" else 1):  # CUDA graphs are recorded at the second call
        alone(), whole()
    rounds = [[timed(run, device=args.device)[0] for run in (alone, whole)] for _ in range(args.rounds)]
    found = sorted(with_head / without for without, with_head in rounds)
    return {
        f"{name}_backbone_ms": round(1000 * statistics.median(without for without, _ in rounds), 1),
        f"{name}_ratio": round(statistics.median(found), 3),
        f"{name}_low": round(found[0], 3),
        f"{name}_high": round(found[-1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=HEADS.names())
    parser.add_argument("--backbones", nargs="+", default=["ibot_b16"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1, help="pairs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="also compiled, in the last of the precisions")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--options", type=json.loads, default={}, help="further options of each head, as JSON")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; 0 counts alone")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="output folder of the CSV")
    args = parser.parse_args()
    start, failures = time.monotonic(), Failures()
    context, pool = multiprocessing.get_context("spawn"), None
    for backbone, head, precisions, compiled in cases(args):
        what = f"{head} on {backbone}, {' '.join(precisions)}{', compiled' * compiled}"
        if time.monotonic() - start > args.seconds:
            print(f"{what} is skipped: {args.seconds} seconds are over", flush=True)
            continue
        pool, failed = pool or ProcessPoolExecutor(1, mp_context=context), len(failures)
        with failures.note(what):
            try:
                rows = pool.submit(measure, head, backbone, precisions, compiled, args).result()
                print(rows[-1], flush=True)
                write(args.out / f"step_{device_name(args.device)}.csv", rows)
            except (ZooError, torch.OutOfMemoryError) as error:
                print(f"{what} is skipped: {error}", flush=True)
        if args.device == "cpu" or len(failures) > failed:
            # On a CPU peak memory is a process's. An error on a GPU can leave it unusable to its process.
            pool.shutdown()
            pool = None
    failures.exit()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a table. A row takes the place of an older one of the same model, sizes and precision."""
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in [*(csv.DictReader(path.open()) if path.exists() else ()), *rows]:
        key = tuple(str(row[name]) for name in KEY)
        table[key] = table.get(key, {}) | row
    write_csv(path, list(table.values()), list(max(table.values(), key=len)))


def cases(args: argparse.Namespace) -> list[tuple[str, str, list[str], bool]]:
    """Backbone, head, precisions and whether compiled, for each process. Compiling comes last: it takes the most time.

    A GPU counts its own memory, so there one process has all precisions.
    """
    groups = [args.precisions] if args.device == "cuda" else [[precision] for precision in args.precisions]
    wanted = [(group, False) for group in groups] + [(args.precisions[-1:], True)] * args.compile
    return [(b, head, group, compiled) for group, compiled in wanted for b in args.backbones for head in args.heads]


if __name__ == "__main__":
    main()
