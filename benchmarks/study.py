"""Train every head on the same pairs, for as many of them, and score it: the runs behind docs/study.md.

    python benchmarks/study.py cub_frozen       photographs of birds, frozen ImageNet features
    python benchmarks/study.py cub_finetuned    photographs of birds, each head fine-tunes the backbone
    python benchmarks/study.py synthetic        synthetic pairs, each head fine-tunes the backbone
    python benchmarks/study.py leave_one_out    PF-WILLOW, trained on three kinds of objects, tested on the fourth
    python benchmarks/study.py zero_shot        PF-WILLOW and CUB without training, at 320 px

A run is one `lightning fit` and one `lightning test` with the YAMLs that are printed, in a folder under runs/study/.
Its result is one file, benchmarks/results/<study>/<run>.json, or <study>_2000/<run>.json with `--pairs 2000`. The
file's `curve` has the PCK of validation pairs by the number of pairs seen. The learning rate of each head and study is
the best on validation pairs, each tried for 12 % of the pairs: benchmarks/results/learning_rates.csv. Rates are tried
until the best lies between two others, or at the end of `LEARNING_RATES`. Rates of a longer run serve a shorter one.
`leave_one_out` takes the rates of `cub_frozen`, so that no pair of PF-WILLOW chooses them. Runs that have a result with
the best rate are skipped, and runs that were interrupted are resumed.
"""

import argparse
import csv
import json
import multiprocessing
import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import corrzoo.cli  # noqa: F401  before the first fork, so that no run imports it again
from corrzoo.__main__ import main as run_command
from corrzoo.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS, CONFIGS, RUNS = ROOT / "benchmarks" / "results", ROOT / "zoo_configs", ROOT / "runs" / "study"
RATES = RESULTS / "learning_rates.csv"

HEADS = ("mirrorguided", "baseline", "gsf", "vitsc", "lpmflow", "actr", "ncnet", "geoaware", "cats", "transformatcher")
SIZES = {
    "ncnet": ("--model.levels=[blocks.4.2, blocks.2.1]",),  # it matches on the grid of the last level
    "geoaware": ("--model.grid=12",),
    "cats": ("--model.grid=12",),
    "transformatcher": (
        "--model.grid=12",
        "--model.layers=2",
    ),  # 20,736 matches: 6 layers would take 3 times ACTR's time
    "mirrorguided": ("--model.c_p=0.6", "--model.c_m=1.2"),  # 1 and 2 of 20 cells, as the demo's of 16
}
"""Options of heads whose demos do not match on 12 x 12 cells."""
ABLATIONS = {
    "mirrorguided": ("no_mirror", "fixed_guidance", "no_consensus_no_guidance", "epe"),
    "actr": ("no_cross_attention", "no_reweighting", "no_multi_path", "no_super_resolution"),
    "lpmflow": ("no_larl", "no_contrastive_loss", "no_pfsr", "no_mmfi"),
    "vitsc": ("table4_none", "table4_asymmetric", "table6_bilinear", "table7_epe_only"),
    "gsf": ("no_pruning", "no_mls", "no_matching"),
}
"""By head, the files of zoo_configs/ablation that the study runs."""
DATASETS = {"cub_frozen": "cub", "cub_finetuned": "cub", "synthetic": "synthetic", "leave_one_out": "leave_one_out"}
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TRIED_FIRST = (3e-4, 1e-3, 3e-3)
SWEEP = 0.12
"""Share of the pairs that each learning rate is tried for."""
MARKS = (0, 800, 2500, 5000, 10000, 20000)
"""Pairs seen at which validation pairs are scored."""
BATCH = 16
PAIRS = 10_000
"""Training pairs that each run sees, unless `--pairs` says otherwise."""
LOCK = multiprocessing.Lock()
KINDS = ("car", "duck", "motorbike", "winebottle")
"""Of PF-WILLOW: `leave_one_out` tests each in turn."""
LITE0 = ("baseline.yaml", "backbone/efficientnet_lite0.yaml")
UNTRAINED = {
    "baseline": LITE0,
    "gsf": ("gsf.yaml", "ablation/gsf/zero_shot.yaml"),
    "mirrorguided": ("mirrorguided.yaml", "ablation/mirrorguided/zero_shot.yaml"),
}
"""By head, the files of zoo_configs for matching without training."""
ZERO_SHOT: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "pfwillow/same-position": (
        "same position, no features",
        (*LITE0, "data/pfwillow.yaml"),
        ("--model.readout=identity",),
    ),
    "pfwillow/dense-flow-lite0": (
        "dense flow",
        (*LITE0, "data/pfwillow.yaml"),
        ("--model.point_query=flow",),
    ),
    "pfwillow/gsf-lite0": ("", (*UNTRAINED["gsf"], "data/pfwillow.yaml"), ()),
    "pfwillow/gsf-eq9-lite0": (
        "eq. 9 as printed",
        (*UNTRAINED["gsf"], "ablation/gsf/eq9.yaml", "data/pfwillow.yaml"),
        ("--model.readout_radius=null",),
    ),
    "pfwillow/gsf-widths-lite0": (
        "7 and 5 as widths",
        (*UNTRAINED["gsf"], "data/pfwillow.yaml"),
        ("--model.c_p=7", "--model.c_m=5"),
    ),
    "pfwillow/gsf-variances-lite0": (
        "7 and 5 as variances",
        (*UNTRAINED["gsf"], "data/pfwillow.yaml"),
        ("--model.c_p=2.646", "--model.c_m=2.236"),
    ),
    "pfwillow/mirrorguided-lite0": ("", (*UNTRAINED["mirrorguided"], "data/pfwillow.yaml"), ()),
    "pfwillow/mirrorguided-two-rounds-lite0": (
        "two rounds of guidance",
        (*UNTRAINED["mirrorguided"], "data/pfwillow.yaml"),
        ("--model.rounds=2",),
    ),
}
"""Runs of `zero_shot` by result file: label, files of zoo_configs, and options."""
WITHOUT = {
    "no mirror image": ("--model.mirror=false",),
    "no consensus": ("--model.consensus=0",),
    "no guidance": ("--model.floor=1",),
    "cosines alone": ("--model.mirror=false", "--model.consensus=0", "--model.floor=1"),
}
"""Parts that MirrorGuided matches without, and the options that leave them out."""
for _data in ("cub", "pfwillow"):
    for _label, _options in WITHOUT.items():
        _name = f"{_data}/mirrorguided-{_label.replace(' ', '-')}-lite0"
        ZERO_SHOT[_name] = (_label, (*UNTRAINED["mirrorguided"], f"data/{_data}.yaml"), _options)
for _head, _files in UNTRAINED.items():
    ZERO_SHOT[f"cub/{_head}-lite0"] = ("", (*_files, "data/cub.yaml"), ())
for _n in range(3):
    _stack = (*LITE0, "data/pfwillow.yaml", f"backbone/efficientnet_lite{_n}.yaml")
    ZERO_SHOT |= {
        f"pfwillow/random-weights-lite{_n}": ("random weights", _stack, ("--model.weights=random",)),
        f"pfwillow/zero-shot-lite{_n}": ("", _stack, ()),
        f"pfwillow/mutual-lite{_n}": ("mutual nearest neighbours", _stack, ("--model.mutual=true",)),
    }


@dataclass(frozen=True)
class Run:
    """One training: a head on the pairs of a study.

    Attributes:
        pairs: How many training pairs are seen; 0 scores the untrained head.
        lr: Learning rate of head and backbone.
        left_out: PF-WILLOW's kind of objects that `leave_one_out` tests.
    """

    study: str
    head: str
    seed: int
    pairs: int
    ablation: str = ""
    lr: float = 0.0
    left_out: str = ""

    @property
    def name(self) -> str:
        parts = [self.head, self.ablation, "" if self.pairs else "untrained", self.left_out]
        return "_".join(filter(None, parts)) + f"-{self.seed}"

    @property
    def group(self) -> str:
        """Folder of its result: the study, with the number of pairs unless it is `PAIRS`."""
        return self.study if self.pairs in (0, PAIRS) else f"{self.study}_{self.pairs}"

    @property
    def result(self) -> Path:
        return RESULTS / self.group / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        """Where it runs, and can be resumed."""
        return RUNS / self.study / (f"{self.name}_lr{self.lr:g}_pairs{self.pairs}" if self.pairs else self.name)

    @property
    def steps(self) -> int:
        return self.pairs // BATCH

    def stack(self) -> list[str]:
        """Files of zoo_configs, from the first to the last."""
        ablation = [f"ablation/{self.head}/{self.ablation}.yaml"] * bool(self.ablation)
        return [f"demo/{self.head}.yaml", "study/recipe.yaml", f"study/{DATASETS[self.study]}.yaml", *ablation]

    def options(self, args: argparse.Namespace) -> list[str]:
        """Options of the command line beside the files."""
        finetune = self.study in ("cub_finetuned", "synthetic")
        options = [f"--seed_everything={self.seed}", f"--data.root={args.data_root}"]
        options += [f"--trainer.accelerator={args.device}", f"--model.finetune={'all' if finetune else 'none'}"]
        options += SIZES.get(self.head, ())
        if self.pairs:
            options += [f"--model.lr={self.lr}", f"--model.backbone_lr={self.lr}", f"--trainer.max_steps={self.steps}"]
        if self.head == "gsf" and self.study == "synthetic":
            options.append("--data.train=synthetic_warps")
        if self.left_out:
            others = [kind for kind in KINDS if kind != self.left_out]
            kinds = {"trn": others, "val": others, "test": [self.left_out]}
            split = {"pfwillow_kinds": {"kinds": kinds, "every": {"val": 9}}}
            options += ["--plugins=pfwillow_kinds", "--data.options=" + json.dumps(split)]
        return options + args.option


# ---------------------------------------------------------------------- one run


def lightning(folder: Path, command: str, stack: Sequence[str], options: Sequence[str]) -> None:
    """Run `lightning <command>` in a folder and a process of its own.

    Raises:
        RuntimeError: if it fails.
    """
    shown = [word for file in stack for word in ("--config", f"zoo_configs/{file}")]
    print("+ lightning", command, shlex.join([*shown, *options]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    words = [command, *(f"--config={CONFIGS / file}" for file in stack), *options]
    process = multiprocessing.get_context("fork").Process(target=_lightning, args=(folder, words))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"failed: see {folder / 'log'}")


def _lightning(folder: Path, words: list[str]) -> None:
    os.chdir(folder)
    with (folder / "log").open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)  # what is not written by Python, too
        run_command(words)


def train(run: Run, args: argparse.Namespace, scored: Sequence[int]) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one. Returns the curve: PCK by number of pairs seen.

    Validation pairs are scored after `scored` pairs and at the end.
    """
    folder = run.folder
    curve, last, ended = folder / "curve.json", folder / "last.ckpt", folder / "ended"
    marks = sorted({min(mark // BATCH, run.steps) for mark in scored} | {run.steps})
    if not ended.exists():
        options = ["--trainer.callbacks=study_curve.Curve", f"--trainer.callbacks.path={curve}"]
        options += [f"--trainer.callbacks.steps={marks}", f"--checkpoint.dirpath={folder}"]
        resume = [f"--ckpt_path={last}"] if last.exists() else []
        lightning(folder, "fit", run.stack(), [*run.options(args), *options, *resume])
        ended.touch()
    return json.loads(curve.read_text())


def execute(run: Run, args: argparse.Namespace) -> None:
    """Train and test a run, and write its results: on the dataset of the study, and on PF-WILLOW after `cub`."""
    if run.study == "leave_one_out":
        folds = [train_and_test(replace(run, left_out=kind), args)["pfwillow_kinds"] for kind in KINDS]
        return write(run.result, merged(folds))
    results = train_and_test(run, args)
    if "pfwillow" in results:
        write(RESULTS / f"{run.group}_pfwillow" / run.result.name, results.pop("pfwillow"))
    (result,) = results.values()
    write(run.result, result)


def train_and_test(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train a run, unless it has no pairs, and test it. Returns the results by dataset."""
    curve = train(run, args, () if run.left_out else MARKS) if run.pairs else {}
    label = run.ablation if run.pairs else "untrained"
    checkpoint = [f"--ckpt_path={run.folder / 'last.ckpt'}"] if run.pairs else []
    results = test(run.folder, label, run.stack(), [*run.options(args), *checkpoint, "--trainer.precision=32-true"])
    # Runs share the machine with others, so their times mean nothing; benchmarks/step.py measures costs.
    return {name: result | {"ms_per_pair": None, "checkpoint": None, "curve": curve} for name, result in results}


def test(
    folder: Path, label: str, stack: Sequence[str], options: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run `lightning test`, and yield the results by dataset."""
    results = folder / "results"
    writer = ["--trainer.callbacks=corrzoo.callbacks.ResultsWriter", f"--trainer.callbacks.folder={results}"]
    writer += [f"--trainer.callbacks.label={label}"] if label else []
    lightning(folder, "test", stack, [*options, *writer])
    for path in sorted(results.glob("*.json")):
        yield path.stem, json.loads(path.read_text())


def merged(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of the folds' results. Scores are means over all pairs, each of which is tested in one fold."""
    pairs = sum(fold["pairs"] for fold in folds)
    # The mean over categories is left out: it is no mean over pairs.
    names = [name for name in folds[0]["pck"] if "/" not in name or name.endswith("/image")]
    pck = {name: sum(fold["pairs"] * fold["pck"][name] for fold in folds) / pairs for name in names}
    breakdown = {"category": {name: row for fold in folds for name, row in fold["breakdown"]["category"].items()}}
    rule = {"kinds": "each in turn is tested, the others are trained on"}
    trained = folds[0]["trained"] and folds[0]["trained"] | {"options": rule}
    memory = max(fold["peak_memory_mb"] for fold in folds)
    same = {"dataset_options": rule, "fingerprint": [fold.get("fingerprint") for fold in folds], "trained": trained}
    # The curves are of pairs that were trained on, and each fold has a checkpoint of its own.
    changed = {"pairs": pairs, "pck": pck, "breakdown": breakdown, "peak_memory_mb": memory}
    return folds[0] | same | changed | {"curve": {}, "checkpoint_sha256": None}


def zero_shot(args: argparse.Namespace) -> None:
    """Match without training: one run for each row of `ZERO_SHOT`."""
    for name, (label, stack, options) in ZERO_SHOT.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            common = ["--seed_everything=0", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
            common += [f"--data.root={args.data_root}", f"--trainer.accelerator={args.device}"]
            ((_, result),) = test(RUNS / "zero_shot" / name, label, stack, [*common, *options])
            write(path, result | {"ms_per_pair": None})  # the machine may do other work


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, and print its scores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    scores = " / ".join(f"{result['pck'][f'pck@{alpha}']:.1f}" for alpha in (0.05, 0.1, 0.15))
    print(f"{path.relative_to(RESULTS)}: PCK@.05/.10/.15 {scores}", flush=True)


# ---------------------------------------------------------------------- learning rates


def learning_rate(run: Run) -> float:
    """The learning rate with the best PCK@.10 on validation pairs. Ablations take that of the whole head."""
    if untried(run):
        raise RuntimeError(f"{run.study}, {run.head}: learning rates {untried(run)} were not tried")
    return best_rate(tried_rates(run))


def untried(run: Run) -> list[float]:
    """Learning rates to try next: those of `TRIED_FIRST`, then the neighbours of the best."""
    tried = tried_rates(run)
    if first := [lr for lr in TRIED_FIRST if lr not in tried]:
        return first
    best = LEARNING_RATES.index(best_rate(tried))
    return [lr for lr in LEARNING_RATES[max(best - 1, 0) : best + 2] if lr not in tried]


def best_rate(tried: dict[float, float]) -> float:
    return max(tried, key=lambda lr: tried[lr])


def tried_rates(run: Run) -> dict[float, float]:
    """PCK@.10 of validation pairs by learning rate, of rates that were tried for long enough."""
    study = "cub_frozen" if run.study == "leave_one_out" else run.study
    rows = [row for row in rates() if rate_key(row) == (study, run.head) and int(row["pairs"]) >= short(run).pairs]
    return {float(row["lr"]): float(row["pck@0.1"]) for row in rows}


def rates() -> list[dict[str, str]]:
    """The rows of benchmarks/results/learning_rates.csv."""
    return list(csv.DictReader(RATES.open())) if RATES.exists() else []


def rate_key(row: dict[str, str]) -> tuple[str, str]:
    return row["study"], row["head"]


def short(run: Run) -> Run:
    """The same for the share of the pairs that a learning rate is tried for."""
    return replace(run, pairs=int(SWEEP * run.pairs) // BATCH * BATCH)


def sweep(run: Run, args: argparse.Namespace) -> None:
    """Try one learning rate for a share of the pairs, and add a row to the table of learning rates."""
    if run.lr in tried_rates(run):
        return
    tried = short(run)
    curve = train(tried, args, scored=())
    row = {"study": run.study, "head": run.head, "lr": run.lr, "pairs": tried.pairs} | curve[str(tried.pairs)]
    with LOCK, RATES.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if not file.tell():
            writer.writeheader()
        writer.writerow({key: f"{value:.2f}" if key.startswith("pck") else value for key, value in row.items()})


# ---------------------------------------------------------------------- all runs


def trainable(run: Run) -> bool:
    """Whether anything trains: the Baseline has no parameter of its own."""
    return run.head != "baseline" or run.study in ("cub_finetuned", "synthetic")


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The runs of a study, in the order in which they are run: seeds, heads, then ablations."""
    base = [Run(args.study, head, seed, args.pairs) for seed in args.seeds for head in args.heads]
    untrained = [replace(run, pairs=0) for run in base if args.study != "cub_finetuned"]
    ablated = [replace(run, ablation=part) for run in base for part in ABLATIONS.get(run.head, ()) if args.ablations]
    return [*untrained, *filter(trainable, base), *ablated]


def finished(run: Run) -> bool:
    """Whether a result is there, of the learning rate that is best by now."""
    if not run.result.exists() or not run.pairs:
        return run.result.exists()
    return json.loads(run.result.read_text())["options"]["lr"] == learning_rate(run)


def study(args: argparse.Namespace) -> None:
    """Choose learning rates, then train and test; `--jobs` runs at a time."""
    runs = runs_of(args)
    heads = {run.head: run for run in runs if run.pairs and run.study != "leave_one_out"}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        while tries := [replace(run, lr=lr, ablation="", seed=0) for run in heads.values() for lr in untried(run)]:
            list(pool.map(partial(sweep, args=args), tries))
        ready = [replace(run, lr=learning_rate(run)) if run.pairs else run for run in runs if not finished(run)]
        list(pool.map(partial(execute, args=args), ready))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*DATASETS, "zero_shot"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="training pairs that each run sees")
    parser.add_argument("--ablations", action="store_true", help="also train each head without one of its parts")
    where = "folder of CUB_200_2011/ and PF-WILLOW/"
    parser.add_argument("--data_root", default=ROOT / "data", type=lambda path: Path(path).absolute(), help=where)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--option", action="append", default=[], help="a further option of each `lightning` command")
    parser.add_argument("--out", type=Path, help="folder of results and runs; default: benchmarks/results, runs/study")
    arguments = parser.parse_args()
    if arguments.out:
        RESULTS, RUNS = arguments.out.resolve(), arguments.out.resolve() / "runs"
        RATES = RESULTS / "learning_rates.csv"
        RESULTS.mkdir(parents=True, exist_ok=True)
    zero_shot(arguments) if arguments.study == "zero_shot" else study(arguments)
