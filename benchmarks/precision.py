"""Half precision: each head is trained in it for some steps, and then evaluated in it and in float32.

On drawn pairs and a small backbone with real weights. Writes benchmarks/results/precision_<device>.csv: the loss at
both ends of training, and by how many points PCK differs, with the standard error of that over the pairs. Run it as
`python benchmarks/precision.py`.
"""

import argparse
import csv
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision

import corrzoo
from corrzoo.callbacks import ResultsWriter
from corrzoo.data.module import PairsDataModule

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
SLOW = 4
"""No CPU has instructions for float16: there, it gets a share of the steps and pairs."""


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
        train, val="synthetic", test=["synthetic"], size=128, batch_size=args.batch, workers=0, options=options
    )


def trainer(args: argparse.Namespace, precision: str | None, *callbacks: Callback) -> Trainer:
    # Given as a plugin: by flag, Lightning takes bfloat16 for float16 on CPUs.
    plugins: Any = [MixedPrecision(PLUGINS[precision], args.device)] if precision else None  # type: ignore[arg-type]
    callbacks += (ResultsWriter(tempfile.mkdtemp(), table=False),)
    return Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu", devices=1, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=list(callbacks), plugins=plugins, log_every_n_steps=1,
    )  # fmt: skip


def measure(head: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    if (precision, args.device) == ("fp16", "cpu"):
        args = argparse.Namespace(**vars(args) | {"steps": args.steps // SLOW, "pairs": args.pairs // SLOW**2})
    seed_everything(0)
    model = corrzoo.create_matcher(head, **BACKBONE | HEADS[head])
    losses = Losses()
    trainer(args, precision, losses).fit(model, data(args, head))
    few = len(losses.seen) // 4
    row: dict[str, Any] = {"head": head, "precision": precision, "device": args.device, "steps": len(losses.seen)}
    row |= {"loss_first": statistics.mean(losses.seen[:few]), "loss_last": statistics.mean(losses.seen[-few:])}
    scored = []
    for kind in (None, precision):
        trainer(args, kind).test(model, data(args, head), verbose=False)
        ((_, metric),) = model.metrics_by_dataset()
        scored.append(metric.rows())
    row["pairs"] = args.pairs
    for alpha in model.hparams.alphas:
        full, half = (torch.tensor([pair[f"pck@{alpha:g}"] for pair in rows]) for rows in scored)
        row |= {
            f"pck@{alpha:g}": full.mean().item(),
            f"pck@{alpha:g} difference": (half - full).mean().item(),
            f"pck@{alpha:g} standard error": (half - full).std().item() / len(full) ** 0.5,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", nargs="*", default=list(HEADS))
    parser.add_argument("--precisions", nargs="*", default=list(PLUGINS), choices=list(PLUGINS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=400)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    path = Path(__file__).parent / "results" / f"precision_{args.device}.csv"
    before = path.read_text().splitlines() if path.exists() else []
    rows: dict[Any, dict[str, Any]] = {(row["head"], row["precision"]): row for row in csv.DictReader(before)}
    for head in args.heads:
        for precision in args.precisions:
            row = measure(head, precision, args)
            rows[head, precision] = {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}
            print(*(f"{name} {value}," for name, value in rows[head, precision].items()), flush=True)
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[head, precision]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows.values())
    print(path)


if __name__ == "__main__":
    main()
