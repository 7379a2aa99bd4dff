"""Half precision: each head is trained in it for some steps, and then evaluated in it and in float32.

On synthetic pairs and a small backbone with real weights. Writes benchmarks/results/precision_<device>.csv: the loss at
both ends of training; how far points move, in pixels, and by how many points PCK differs, with the standard error of
that over the pairs; and, in float32 behind a backbone in half precision and the other way round, where that comes from.
Run it as `python benchmarks/precision.py`.
"""

import argparse
import csv
import functools
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

import corrzoo
from corrzoo.data.module import PairsDataModule
from corrzoo.scoring.evaluation import predict_points
from corrzoo.scoring.pck import PCK
from corrzoo.tables import write_csv
from corrzoo.types import Features, Pair
from measuring import RESULTS

BACKBONE = {"backbone": "efficientnet_lite0", "levels": ["blocks.2.1", "blocks.4.2"], "lr": 1e-3, "backbone_lr": 1e-3}
HEADS: dict[str, dict[str, Any]] = {
    "Baseline": {},
    "ACTR": {"grid": 8, "depth": 1, "width": 96, "lr": 3e-4},
    "ViTSC": {"attend_at": "native", "head_resolution": 0.125, "low_stages": 1, "low_weights": "random", "lr": 3e-4},
    "GSF": {"grid": 8, "width": 32, "stage1": 0.0},  # whose second stage adds terms to the loss
    "LPMFlow": {"grid": 4, "depth": 1, "width": 96, "lr": 3e-4},
}
"""Sizes that a CPU can train; transformers from nothing want smaller steps."""
PLUGINS = {"bf16": "bf16-mixed", "fp16": "16-mixed"}
PARTS = {"all": (True, True), "backbone": (True, False), "head": (False, True)}
"""Where half precision is: in the backbone, in the head."""
LOCATED = 50
"""Batches for which the effect of each part is measured."""
SLOW = {"size": 64, "batch": 2, "pairs": 60}
"""Smaller workload for float16 on CPUs, most of which have no instructions for it."""


class Losses(Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.seen.append(trainer.callback_metrics["train/loss"].item())


def data(args: argparse.Namespace, head: str) -> PairsDataModule:
    train = "synthetic_warps" if head == "GSF" else "synthetic"  # which learns from warps, without keypoints
    length = {"trn": args.steps * args.batch, "test": args.pairs}
    options = {"synthetic": {"length": length}, "synthetic_warps": {"length": length["trn"]}}
    return PairsDataModule(
        train,
        val="synthetic",
        test=["synthetic"],
        image_size=args.size,
        batch_size=args.batch,
        num_workers=0,
        options=options,
    )


def train(model: corrzoo.Matcher, pairs: PairsDataModule, half: MixedPrecision) -> list[float]:
    """The loss of each step."""
    losses = Losses()
    # Given as a plugin: by flag, Lightning takes bfloat16 for float16 on CPUs.
    trainer = Trainer(
        accelerator="gpu" if half.device == "cuda" else "cpu", devices=1, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[losses], plugins=[half], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, pairs)
    return losses.seen


def matches(model: corrzoo.Matcher, pair: Pair, half: Any, backbone: bool, head: bool) -> Tensor:
    """(B, K, 2) predictions when the given parts of a matcher run in half precision."""
    forward = model.backbone.forward

    def mixed(image: Tensor) -> Features:
        with half(enabled=backbone):
            seen = forward(image)
        return seen if head else seen._replace(maps=[level.float() for level in seen.maps])

    model.backbone.forward = mixed  # type: ignore[method-assign]
    with half(enabled=head):
        points = predict_points(model, pair)
    model.backbone.forward = forward  # type: ignore[method-assign]
    return points


def measure(head: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    if (precision, args.device) == ("fp16", "cpu"):
        args = argparse.Namespace(**vars(args) | SLOW)
    seed_everything(0)
    model, pairs = corrzoo.create_matcher(head, **BACKBONE | HEADS[head]), data(args, head)
    losses = train(model, pairs, MixedPrecision(PLUGINS[precision], args.device))  # type: ignore[arg-type]
    few = len(losses) // 4
    row: dict[str, Any] = {"head": head, "precision": precision, "device": args.device, "size": args.size}
    row |= {"steps": len(losses), "batch": args.batch}
    row |= {"loss_first": statistics.mean(losses[:few]), "loss_last": statistics.mean(losses[-few:])}

    model.eval().to(args.device)
    half = functools.partial(torch.autocast, args.device, torch.bfloat16 if precision == "bf16" else torch.float16)
    scores = [PCK("default:bbox", model.hparams.alphas).to(args.device) for _ in range(2)]
    moved: dict[str, list[Tensor]] = {what: [] for what in PARTS}
    pairs.setup("test")
    until, scored = time.monotonic() + args.seconds, 0
    for i, batch in enumerate(pairs.test_dataloader()[0]):
        pair = Pair(*(field.to(args.device) for field in batch))
        exact = matches(model, pair, half, False, False)
        scores[0].update(exact, pair)
        for what, parts in list(PARTS.items())[: 3 if i < LOCATED else 1]:
            points = matches(model, pair, half, *parts)
            distance = (points - exact) * args.size / pair.trg_size.unsqueeze(1)
            moved[what].append(distance.norm(dim=-1)[pair.kps_mask])
            if what == "all":
                scores[1].update(points, pair)
        scored += len(pair.index)
        if time.monotonic() > until:
            break
    row["pairs"] = scored
    for what, distances in moved.items():
        row |= {f"pixels, {what}": torch.cat(distances).mean().item()}
        row |= {f"pixels, {what}, median": torch.cat(distances).median().item()}
    for alpha in model.hparams.alphas:
        full, other = (torch.tensor([pair[f"pck@{alpha:g}"] for pair in metric.rows()]) for metric in scores)
        row |= {
            f"pck@{alpha:g}": full.mean().item(),
            f"pck@{alpha:g} difference": (other - full).mean().item(),
            f"pck@{alpha:g} standard error": (other - full).std().item() / len(full) ** 0.5,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", nargs="*", default=list(HEADS))
    parser.add_argument("--precisions", nargs="*", default=list(PLUGINS), choices=list(PLUGINS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=200, help="time limit of scoring")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    path = RESULTS / f"precision_{args.device}.csv"
    before = path.read_text().splitlines() if path.exists() else []
    rows: dict[Any, dict[str, Any]] = {(row["head"], row["precision"]): row for row in csv.DictReader(before)}
    for head in args.heads:
        for precision in args.precisions:
            row = measure(head, precision, args)
            rows[head, precision] = {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}
            print(*(f"{name} {value}," for name, value in rows[head, precision].items()), flush=True)
            write_csv(path, list(rows.values()), list(rows[head, precision]))
    print(path)


if __name__ == "__main__":
    main()
