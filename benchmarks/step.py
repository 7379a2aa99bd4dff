"""Cost of a head: forward and training step as ratios to its backbone alone, parameters, FLOPs, peak memory.

Each pair of head and backbone has a process of its own. Head and backbone are timed in turns, and a ratio is the median
over the rounds. Adds its rows to benchmarks/results/step_<device>.csv.
Run `python benchmarks/step.py --heads ACTR LPMFlow`. With `--rounds 0` it counts parameters and FLOPs and times
nothing; the cells of times are empty, or stay as they are.
"""

import argparse
import csv
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import corrzoo
from corrzoo.types import Pair, ZooError

OPTIONS: dict[str, dict[str, Any]] = {
    "ACTR": {"backbone_size": 256, "optimizer": "adamw"},
    "LPMFlow": {"backbone_size": 256, "optimizer": "adamw"},
    "GeoAware": {"grid": 16, "optimizer": "adamw"},
    "CATs": {"levels": [*range(12)], "optimizer": "adamw"},
    "TransforMatcher": {"levels": [*range(12)]},
}
"""Options of the paper's model that differ from the defaults; a CNN of stride 32 has the same 256 px input."""
CONFIGS = Path(__file__).resolve().parents[1] / "zoo_configs"


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
    mask = torch.ones(count, 10, dtype=torch.bool, device=device)
    return Pair(*images, *kps, mask, *(field.to(device) for field in rest))


def timed(run: Callable[[], object], device: str) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def measure(head: str, backbone: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = corrzoo.create_matcher(head, backbone, weights="random", **options_of(head, backbone)).to(args.device)
    pair = pairs(args.batch, args.size, args.device)
    both = torch.cat([pair.src_img, pair.trg_img])

    def features(image: Tensor) -> Tensor:
        return sum((level.square().mean() for level in model.backbone(image).maps), torch.zeros((), device=args.device))

    def loss() -> Tensor:
        terms = model.loss(model(pair.src_img, pair.trg_img), pair)
        return terms["loss"] if isinstance(terms, dict) else terms

    def stepping(objective: Callable[[], Tensor], parameters: Any) -> Callable[[], None]:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[model.hparams.optimizer]
        optimizer = kind(list(parameters), lr=1e-6)

        def step() -> None:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                value = objective()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def forward(run: Callable[[], object]) -> Callable[[], None]:
        def evaluate() -> None:
            with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                run()

        return evaluate

    row: dict[str, Any] = {"head": head, "backbone": backbone, "size": args.size, "batch": args.batch}
    total = sum(p.numel() for p in model.parameters())
    row |= {"params_head_m": total - model.backbone.num_params, "params_total_m": total}
    row |= {key: round(row[key] / 1e6, 3) for key in ("params_head_m", "params_total_m")}
    model.eval()
    runs = {"forward": (forward(lambda: features(both)), forward(lambda: model(pair.src_img, pair.trg_img)))}
    for key, run in zip(("gflops_backbone", "gflops"), runs["forward"], strict=True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()  # the counter leaves out the CPU's fused attention
        row[key] = round(counter.get_total_flops() / 1e9 / args.batch, 1)  # of a pair
    if not args.rounds:
        return row
    row |= ratios("forward", *runs["forward"], args)
    model.train()
    alone = stepping(lambda: features(both), (p for p in model.backbone.parameters() if p.requires_grad))
    row |= ratios("step", alone, stepping(loss, (p for p in model.parameters() if p.requires_grad)), args)
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return row | {"peak_mb": peak // 2**20, "bf16": args.bf16, "threads": args.threads, "torch": torch.__version__}


def ratios(
    name: str, alone: Callable[[], None], whole: Callable[[], None], args: argparse.Namespace
) -> dict[str, float]:
    """Time of the backbone in ms, and of the whole model as a multiple: median, lowest, highest."""
    alone(), whole()
    rounds = [(timed(alone, args.device), timed(whole, args.device)) for _ in range(args.rounds)]
    found = sorted(with_head / without for without, with_head in rounds)
    return {
        f"{name}_backbone_ms": round(statistics.median(without for without, _ in rounds), 1),
        f"{name}_ratio": round(statistics.median(found), 3),
        f"{name}_low": round(found[0], 3),
        f"{name}_high": round(found[-1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=corrzoo.list_heads())
    parser.add_argument("--backbones", nargs="+", default=["ibot_b16"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1, help="pairs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; 0 counts alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="output folder of the CSV")
    args = parser.parse_args()
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name() if args.device == "cuda" else "cpu").lower()
    rows = []
    context = multiprocessing.get_context("spawn")  # a fresh process each: peak memory is a process's
    for backbone in args.backbones:
        for head in args.heads:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    rows.append(pool.submit(measure, head, backbone, args).result())
                except ZooError as error:
                    print(f"{head} on {backbone} is skipped: {error}")
                    continue
            print(rows[-1], flush=True)
    if rows:
        write(args.out / f"step_{name}.csv", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a table. A row takes the place of an older one of the same head, backbone and sizes."""
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in [*(csv.DictReader(path.open()) if path.exists() else ()), *rows]:
        key = tuple(str(row[name]) for name in ("head", "backbone", "size", "batch"))
        table[key] = table.get(key, {}) | row
    with path.open("w", newline="") as file:
        fields = max(table.values(), key=len)
        writer = csv.DictWriter(file, fieldnames=fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


if __name__ == "__main__":
    main()
