"""Evaluating the Baseline on SPair-71k's number of test pairs, and PCK alone, against the way that released code does.

The images are as large as SPair-71k's and are written to a temporary folder; what they show and what the weights know
does not matter to the time. Writes evaluation.csv and pck.csv into benchmarks/results: CPU seconds of one process, the
two ways by turns, ratios as medians over the rounds. The slow way is given a sample of the pairs, whose scores are
compared. evaluation_profile.csv has the share of each part of `lightning test` in its CPU time, without worker
processes. Run it as `python benchmarks/evaluation.py`.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler
from torch.utils.data import DataLoader, Subset

import corrzoo
from corrzoo.data import PairDataset, create_dataset
from corrzoo.data.module import PairsDataModule
from corrzoo.data.readers.spair import CATEGORIES
from corrzoo.geometry import transfer
from corrzoo.matcher import Matcher
from corrzoo.scoring.evaluation import Evaluation
from corrzoo.scoring.pck import ALPHAS, PCK
from corrzoo.tables import write_csv
from corrzoo.types import Pair
from data import BATCH, SIZE, PublishedWay, row, write
from measuring import RESULTS, timed

STORED = 4096
"""Number of pairs whose stored predictions are scored at once."""


def loops(pred: torch.Tensor, gt: torch.Tensor, boxes: torch.Tensor, counts: list[int]) -> list[list[float]]:
    """BASELINE, not corrzoo: PCK of each pair by loops over keypoints and thresholds."""
    scores = []
    for b, n in enumerate(counts):
        length = max(boxes[b][2] - boxes[b][0], boxes[b][3] - boxes[b][1])
        correct = [0] * len(ALPHAS)
        for k in range(n):
            dx, dy = pred[b, k, 0] - gt[b, k, 0], pred[b, k, 1] - gt[b, k, 1]
            distance = torch.sqrt(dx**2 + dy**2)
            for a, alpha in enumerate(ALPHAS):
                if distance <= alpha * length:
                    correct[a] += 1
        scores.append([c / n for c in correct])
    return scores


@torch.no_grad()
def published(model: Matcher, dataset: PublishedWay, chosen: list[int]) -> list[list[float]]:
    """BASELINE, not corrzoo: both images decoded and run for each pair, the whole flow computed, PCK by loops."""
    scores = []
    for sample in DataLoader(Subset(dataset, chosen), BATCH):
        flow = model(sample["src_img"], sample["trg_img"]).flow
        points = transfer(sample["src_kps"], flow, (SIZE, SIZE))
        back = sample["trg_size"].unsqueeze(1) / SIZE
        scores += loops(points * back, sample["trg_kps"] * back, sample["trg_box"], sample["n"].tolist())
    return scores


def part_of(root: Path, number: int, count: int) -> Path:
    """Write a dataset of the test pairs of some categories. Each image is in as many pairs as in the full dataset."""
    part = root / f"part{number}"
    home = part / "SPair-71k"
    (home / "Layout" / "large").mkdir(parents=True, exist_ok=True)
    for name in ("JPEGImages", "PairAnnotation"):
        if not (home / name).exists():
            (home / name).symlink_to((root / "SPair-71k" / name).resolve())
    wanted = [CATEGORIES[(number * count + k) % len(CATEGORIES)] for k in range(count)]
    lines = (root / "SPair-71k" / "Layout" / "large" / "test.txt").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.strip().rsplit(":", 1)[1] in wanted]
    (home / "Layout" / "large" / "test.txt").write_text("".join(kept))
    return part


def lightning_test(part: Path, profiler: Profiler | None = None) -> tuple[Trainer, PairsDataModule]:
    """Trainer and data of `lightning test`, with images packed and annotations parsed, as in runs after the first."""
    create_dataset("spair71k", part, "test", size=SIZE).pack()
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, accelerator="cpu", devices=1)
    trainer = Trainer(default_root_dir=part, profiler=profiler, **quiet)
    data = PairsDataModule(root=str(part), test=["spair71k"], image_size=SIZE, batch_size=BATCH, num_workers=0)
    return trainer, data


def end_to_end(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Row of `lightning test`."""
    model = corrzoo.create_matcher("Baseline", args.backbone, weights="random", alphas=ALPHAS).eval()
    rates: dict[str, list[float]] = {"published": [], "corrzoo": []}
    pairs = differing = 0
    for number in range(args.rounds):
        part = part_of(root, number, args.categories)
        trainer, data = lightning_test(part)
        theirs = PublishedWay(part, "test")
        chosen = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(number))[: args.sample].tolist()
        seconds, scores = timed(published, model, theirs, chosen)
        rates["published"].append(args.sample / seconds)
        rates["corrzoo"].append(len(theirs) / timed(trainer.test, model, data, None, False)[0])
        rows = model.evaluation.by_name()[0][1].rows()
        for index, score in zip(chosen, scores, strict=True):
            ours = [rows[index][f"pck@{alpha:g}"] / 100 for alpha in ALPHAS]
            differing += max(abs(a - b) for a, b in zip(ours, score, strict=True)) > 1e-9
        pairs += len(theirs)
        print(
            f"round {number}: {rates['published'][-1]:.2f} -> {rates['corrzoo'][-1]:.1f} pairs a CPU second", flush=True
        )
    how = f"{args.backbone}, {SIZE} px, batches of {BATCH}; {pairs} pairs, {args.categories} categories a round; the "
    how += f"published way {args.sample} a round, of which {differing} are scored otherwise"
    return row("lightning test, Baseline", "pairs/CPU s", rates["published"], rates["corrzoo"], True, how)


class Parts(Profiler):
    """CPU seconds of each part of an evaluation. A part within another counts for the inner one alone."""

    ACTIONS: ClassVar = {
        "test_next": "loader",
        "batch_to_device": "transfer",
        "[Callback]ResultsWriter": "result files",
    }
    """Part by what Lightning's name for an action contains; other actions belong to the part they are in."""
    METHODS: ClassVar = [
        (Evaluation, "features", "backbone"),
        (Evaluation, "predict", "head"),
        (Evaluation, "scores", "PCK"),
        (PCK, "update", "PCK"),
    ]

    def __init__(self) -> None:
        super().__init__()
        names = [*self.ACTIONS.values(), *(part for _, _, part in self.METHODS), "Lightning and start"]
        self.seconds = dict.fromkeys(names, 0.0)
        self.within, self.since = ["Lightning and start"], time.process_time()

    def start(self, action_name: str) -> None:
        self._count()
        parts = [action_name] if action_name in self.seconds else []
        parts += [part for text, part in self.ACTIONS.items() if text in action_name]
        self.within.append((parts or self.within[-1:])[0])

    def stop(self, action_name: str) -> None:
        self._count()
        self.within.pop()

    def _count(self) -> None:
        now = time.process_time()
        self.seconds[self.within[-1]] += now - self.since
        self.since = now

    def measure(self, trainer: Trainer, model: Matcher, data: PairsDataModule) -> dict[str, float]:
        """Run `lightning test`. Returns the share of each part, in percent."""
        with ExitStack() as stack:
            for owner, name, part in self.METHODS:
                stack.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), part)))
            self.since = time.process_time()
            trainer.test(model, data, verbose=False)
            self._count()
        return {part: 100 * seconds / sum(self.seconds.values()) for part, seconds in self.seconds.items()}

    def _timed(self, method: Any, part: str) -> Any:
        @functools.wraps(method)
        def run(*args: Any) -> Any:
            with self.profile(part):
                return method(*args)

        return run


def profile(root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `lightning test` by part: the median of the rounds, each on the pairs of one category."""
    model = corrzoo.create_matcher("Baseline", args.backbone, weights="random", alphas=ALPHAS).eval()
    rounds: list[dict[str, float]] = []
    for number in range(args.rounds + 1):
        part = part_of(root, number, 1)
        parts = Parts()
        trainer, data = lightning_test(part, parts)
        rounds.append(parts.measure(trainer, model, data))
    how = f"Baseline on {args.backbone}, {SIZE} px, batches of {BATCH}, no worker processes, one thread"
    return [
        {
            "part": part,
            "share": f"{statistics.median(row[part] for row in rounds[1:]):.1f}",  # the first imports modules
            "low": f"{min(row[part] for row in rounds[1:]):.1f}",
            "high": f"{max(row[part] for row in rounds[1:]):.1f}",
            "how": how,
        }
        for part in rounds[0]
    ]


def scored(parts: list[tuple[torch.Tensor, Pair]]) -> PCK:
    """Add all predictions to corrzoo's metric and compute every average."""
    metric = PCK("default:bbox", ALPHAS)
    for pred, pair in parts:
        metric.update(pred, pair)
    metric.compute()
    return metric


def pck_alone(root: Path, rounds: int, sample: int = 500) -> list[dict[str, Any]]:
    """Rows of PCK: all test pairs at once, and in the batches of an evaluation, which the metric buffers."""
    dataset = create_dataset("spair71k", root, "test", size=8)  # small images, as only annotations are read
    samples = [dataset[i] for i in range(len(dataset))]
    pair = PairDataset.collate(samples)
    noise = 40 * torch.randn(pair.trg_kps.shape, generator=torch.Generator().manual_seed(0))
    gt = pair.trg_kps * (pair.trg_size / 8).unsqueeze(1)
    pred, counts = gt + noise, pair.kps_mask.sum(1).tolist()
    stored, batched = (
        [(pred[i : i + n], Pair(*(field[i : i + n] for field in pair))) for i in range(0, len(samples), n)]
        for n in (STORED, BATCH)
    )
    rates: dict[str, list[float]] = {"loops": [], "stored": [], "batched": []}
    for _ in range(rounds):
        seconds, scores = timed(loops, pred[:sample], gt[:sample], pair.trg_box[:sample], counts[:sample])
        rates["loops"].append(sample / seconds)
        for name, parts in (("stored", stored), ("batched", batched)):
            seconds, metric = timed(scored, parts)
            rates[name].append(len(samples) / seconds)
            for ours, score in zip(metric.rows(), scores, strict=False):
                assert max(abs(ours[f"pck@{a:g}"] / 100 - s) for a, s in zip(ALPHAS, score, strict=True)) < 1e-9
    how = f"{len(samples)} pairs, the published way {sample} of them"
    return [
        row(f"PCK of {STORED} pairs at a time", "pairs/CPU s", rates["loops"], rates["stored"], True, how),
        row(f"PCK of {BATCH} pairs at a time", "pairs/CPU s", rates["loops"], rates["batched"], True, how),
    ]


def main() -> None:
    """Write the dataset, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=32, help="pairs of the published way per round")
    parser.add_argument("--categories", type=int, default=2, help="categories that are evaluated per round")
    parser.add_argument("--backbone", default="dinov2_s14")
    parser.add_argument("--only", choices=["pck", "test", "profile"], help="measure only one of them")
    parser.add_argument("--root", type=Path, help="folder to write the dataset to, or to read it from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = args.root or Path(folder)
        os.environ["CORRZOO_CACHE"] = str(root / "cache")
        if not (root / "SPair-71k").exists():
            write(root, ["test"])
        if args.only in (None, "pck"):
            write_csv(RESULTS / "pck.csv", pck_alone(root, 5 * args.rounds))
        if args.only in (None, "test"):
            write_csv(RESULTS / "evaluation.csv", [end_to_end(root, args)])
        if args.only in (None, "profile"):
            write_csv(RESULTS / "evaluation_profile.csv", profile(root, args))


if __name__ == "__main__":
    main()
