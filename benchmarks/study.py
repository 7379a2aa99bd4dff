"""The study: on equal terms, which head helps, and which part of it, with what.

    python benchmarks/study.py synthetic          every head and its main ablations, on drawn pairs
    python benchmarks/study.py zero_shot          real weights without any training, on PF-WILLOW
    python benchmarks/study.py leave_one_out      every head learns from three kinds of PF-WILLOW, and meets the fourth
    python benchmarks/study.py costs              how long the runs of the first take for a pair, all in turn

Each run is one `lightning fit` and one `lightning test` with the YAMLs that this prints, in a folder under
runs/study/; its result goes to benchmarks/results/<study>/<run>.json. What is there already is not run again.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import corrzoo.cli  # before the first fork, so that no run imports it anew
from corrzoo.__main__ import main as run_command
from corrzoo.scoring.evaluation import predict_points

ROOT = Path(__file__).resolve().parents[1]
RESULTS, CONFIGS, RUNS = ROOT / "benchmarks" / "results", ROOT / "zoo_configs", ROOT / "runs" / "study"

SIZES = {
    head: (f"{head}.yaml", "study/synthetic.yaml", *([f"study/{head}.yaml"] if head != "baseline" else []))
    for head in ("baseline", "actr", "vitsc", "gsf", "lpmflow")
}
ABLATIONS = {
    "actr": ("no_cross_attention", "no_reweighting", "no_multi_path", "no_super_resolution"),
    "lpmflow": ("no_larl", "no_contrastive_loss", "no_pfsr", "no_mmfi"),
    "vitsc": ("table4_none", "table4_asymmetric", "table6_bilinear", "table7_epe_only"),
    "gsf": ("no_pruning", "no_mls", "no_matching"),
}
"""By head, the files of zoo_configs/ablation that the study runs."""
BACKBONES = {"efficientnet_lite0": (), "efficientnet_lite2": ("study/efficientnet_lite2.yaml",)}
WIDTHS = ("--model.c_p=4.2", "--model.c_m=3.0")
"""On 12 cells instead of 20."""
FEATURES = "features.safetensors"
PAIRS = {"features": 2400, "head": 800}
"""How many drawn pairs, or warps, each learns from."""


def lightning(folder: Path, command: str, stack: Iterable[str], *options: str) -> None:
    """Run `lightning <command>` in a folder and a process of its own. `stack` names files of zoo_configs, and options.

    Raises:
        SystemExit: when it fails.
    """
    args = [item if item.startswith("--") else f"--config={CONFIGS / item}" for item in stack]
    shown = [[item] if item.startswith("--") else ["--config", f"zoo_configs/{item}"] for item in stack]
    print("+ lightning", command, shlex.join([*chain(*shown), *options]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, [command, *args, *options]))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"failed: {folder / 'log'} says why")


def _run(folder: Path, args: list[str]) -> None:
    with (folder / "log").open("a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    os.chdir(folder)
    run_command(args)


def run(into: Path, folder: Path, name: str, label: str, stack: Iterable[str], seed: int, *, fit: bool = True) -> None:
    """Train, unless `fit` is false, and test; the result goes `into` a file, unless that is there."""
    if into.exists():
        return
    options = common(name, seed, label)
    if fit:
        lightning(folder, "fit", stack, *options, f"--checkpoint.dirpath={name}")
    lightning(folder, "test", stack, *options, *([f"--ckpt_path={name}/last.ckpt"] if fit else []))
    (result,) = (folder / name).glob("*.json")
    write(into, json.loads(result.read_text()))


def common(name: str, seed: int, label: str) -> tuple[str, ...]:
    """The options that all runs have in common: what is written goes into the folder `name`."""
    callback = "--trainer.callbacks=corrzoo.callbacks.ResultsWriter"
    labelled = (callback, f"--trainer.callbacks.folder={name}", f"--trainer.callbacks.label={label}")
    return ("--trainer.logger=false", f"--seed_everything={seed}", "--trainer.enable_progress_bar=false", *labelled)


def told(path: Path) -> None:
    """Print what a result file says."""
    scores = json.loads(path.read_text())["pck"]
    values = " / ".join(f"{scores[f'pck@{alpha}']:.1f}" for alpha in (0.05, 0.1, 0.15))
    print(f"{path.stem}: PCK@.05/.10/.15 {values}", flush=True)


def synthetic(seeds: list[int], backbones: list[str], ablations: bool) -> None:
    """Every head on the features that the Baseline's recipe leaves; ablations on the first backbone."""
    results = RESULTS / "synthetic"
    for backbone in backbones:
        for seed in seeds:
            folder, extra = RUNS / "synthetic" / backbone / str(seed), BACKBONES[backbone]
            mine = (*extra, drawings("head", seed))

            def one(name: str, label: str, stack: Iterable[str], fit: bool = True) -> None:
                run(results / f"{name}-{backbone}-{seed}.json", folder, name, label, stack, seed, fit=fit)  # noqa: B023

            tuned = (*SIZES["baseline"], *extra, "study/features.yaml", drawings("features", seed))
            one("features", "whole backbone fine-tuned", tuned)
            save_features(folder / "features" / "last.ckpt", folder / FEATURES)
            untouched = (*SIZES["baseline"], *mine, "--model.weights=pretrained")
            one("imagenet", "ImageNet features, untrained", untouched, fit=False)
            for head, stack in SIZES.items():
                one(head, "", (*stack, *mine))
                for ablation in ABLATIONS.get(head, ()) if ablations else ():
                    name = f"{head}_{ablation}"
                    one(name, name, (*stack, *mine, f"ablation/{name}.yaml"))
            if ablations:
                one("gsf_widths", "5.1's 7 and 5 read as widths", (*SIZES["gsf"], *mine, *WIDTHS))


def drawings(learns: str, seed: int) -> str:
    """The option that draws what the features or a head learn from: new for each of the two and for each seed.

    The pairs of validation and test are the same for all.
    """
    length, drawn = PAIRS[learns], 2 * seed + list(PAIRS).index(learns)
    pairs = {"length": {"trn": length, "val": 200, "test": 400}, "seed": {"trn": drawn}}
    return "--data.options=" + json.dumps({"synthetic": pairs, "synthetic_warps": {"length": length, "seed": drawn}})


def costs(rounds: int = 5, size: int = 8) -> None:
    """Measure ms_per_pair of the first seed's synthetic runs anew, and write it into the result files of all seeds.

    The tests of the study run when they run, beside whatever else the machine does. Here all models answer the same
    pairs in turn, several times over, each image through the backbone once; the median of the processor's time counts.
    """
    torch.set_num_threads(1)
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=96)
    batch = dataset.collate([dataset[i] for i in range(size)])
    stems = sorted({path.stem.rpartition("-")[0] for path in (RESULTS / "synthetic").glob("*-0.json")})
    models, times = {}, defaultdict[str, list[float]](list)
    for stem in stems:
        name, _, backbone = stem.partition("-")
        # the untrained one costs what the trained one does
        run = "features" if name == "imagenet" else name
        models[stem] = corrzoo.load(RUNS / "synthetic" / backbone / "0" / run / "last.ckpt").eval()
    with torch.no_grad():
        for _ in range(rounds + 1):
            for stem, model in models.items():
                began = time.process_time()
                predict_points(model, batch)
                times[stem].append(1000 * (time.process_time() - began) / size)
    for stem in stems:
        measured = median(times[stem][1:])  # the first round warms up
        print(f"{stem}: {measured:.1f} ms a pair ({min(times[stem][1:]):.1f} to {max(times[stem][1:]):.1f})")
        for path in (RESULTS / "synthetic").glob(f"{stem}-*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"ms_per_pair": measured}, indent=1) + "\n")


def save_features(checkpoint: Path, path: Path) -> None:
    """What a run's backbone has learnt, as a file for --model.weights."""
    from safetensors.torch import save_file

    if not path.exists():
        network = corrzoo.load(checkpoint).backbone.trunk.model
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)


def zero_shot(root: str) -> None:
    """Without any training: each backbone whose weights a package carries, and both floors."""
    results, folder = RESULTS / "pfwillow", RUNS / "zero_shot"

    def one(name: str, label: str, *stack: str) -> None:
        base = ("baseline.yaml", "data/pfwillow.yaml", "backbone/efficientnet_lite0.yaml", f"--data.root={root}")
        run(results / f"{name}.json", folder, name, label, (*base, *stack), 0, fit=False)

    one("same-position", "same position, no features", "--model.readout=identity")
    for n in range(3):
        extra = [f"backbone/efficientnet_lite{n}.yaml"]
        one(f"random-weights-lite{n}", "random weights", *extra, "--model.weights=random")
        one(f"zero-shot-lite{n}", "", *extra)
        one(f"mutual-lite{n}", "mutual nearest neighbours", *extra, "--model.mutual=true")


FOLDS = ("car", "duck", "motorbike", "winebottle")
REAL = {
    "baseline": (),
    "actr": ("--model.grid=6",),
    "vitsc": (),
    "gsf": ("--model.grid=10", "--model.c_p=0.75", "--model.c_m=3.5"),
    "lpmflow": (),
}
"""By head, what is not as in its file: grids for images of 160 pixels."""
FLOORS = (
    ("same-position", "same position, no features", "--model.readout=identity"),
    ("untrained", "untrained", "--model.finetune=none"),
)
"""What is scored beside the heads: a file's name, a label, an option."""
STEPS = (10, 20)
"""Of 8 pairs: what inner folds choose from."""


def leave_one_out(root: str, seeds: list[int], heads: list[str]) -> None:
    """Every head learns from three kinds of objects, and is scored on the fourth; so each pair is scored once.

    How long it learns is chosen without a look at that fourth: among the three, by training on two, scoring the third.
    """
    results, folder = RESULTS / "pfwillow_leave_one_out", RUNS / "leave_one_out"
    for name, label, option in FLOORS:
        stack = ("--plugins=pfwillow_kinds", "baseline.yaml", "study/pfwillow.yaml", option, f"--data.root={root}")
        path = folder / f"{name}.json"
        run(path, folder, name, label, (*stack, _options({"test": list(FOLDS)})), 0, fit=False)
        write(results / f"{name}.json", merged([json.loads(path.read_text())], {}))
    for head in heads:
        mine = (f"study/{head}.yaml",) if head != "baseline" else ()
        stack = ("--plugins=pfwillow_kinds", f"{head}.yaml", *mine, "study/pfwillow.yaml", *REAL[head])
        stack = (*stack, f"--data.root={root}")
        if all((results / f"{head}-{seed}.json").exists() for seed in seeds):
            continue
        curves = {}
        for pair in combinations(FOLDS, 2):
            name, others = f"{head}-inner-{'-'.join(pair)}", [kind for kind in FOLDS if kind not in pair]
            path = folder / name / "curve.json"
            if not path.exists():
                kinds = _options({"trn": list(pair), "val": others}, every={"val": 7})
                options = (*common(name, 0, "")[:3], "--trainer.callbacks=pfwillow_kinds.Curve", kinds)
                options += (f"--trainer.callbacks.path={name}/curve.json", f"--checkpoint.dirpath={name}")
                steps = (f"--trainer.max_steps={STEPS[-1]}", f"--trainer.val_check_interval={STEPS[0]}")
                (folder / name).mkdir(parents=True, exist_ok=True)
                lightning(folder, "fit", stack, *options, *steps, "--trainer.num_sanity_val_steps=0")
            curves[pair] = json.loads(path.read_text())
        chosen = {kind: best_steps(curves, kind) for kind in FOLDS}
        print(f"{head}: steps {chosen}", flush=True)
        for seed in seeds:
            parts = []
            for kind in FOLDS:
                name, learnt = f"{head}-{seed}-{kind}", [other for other in FOLDS if other != kind]
                options = (
                    _options({"trn": learnt, "val": learnt, "test": [kind]}),
                    f"--trainer.max_steps={chosen[kind]}",
                )
                path = folder / f"{name}.json"
                run(path, folder, name, "", (*stack, *options, "--trainer.limit_val_batches=0"), seed)
                parts.append(json.loads(path.read_text()))
            write(results / f"{head}-{seed}.json", merged(parts, chosen))


def write(path: Path, result: dict[str, Any]) -> None:
    """A result file, and what it says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    told(path)


def _options(kinds: dict[str, list[str]], **others: dict[str, int]) -> str:
    return "--data.options=" + json.dumps({"pfwillow_kinds": {"kinds": kinds, **others}})


def best_steps(curves: dict[tuple[str, ...], dict[str, dict[str, float]]], tested: str) -> int:
    """The steps with the best mean PCK over the inner folds that never saw the tested kind.

    Args:
        curves: By the two kinds that were learnt from, the PCK of the others at each number of steps.
        tested: The kind that is left out.
    """

    def mean(steps: int) -> float:
        inner = [pair for pair in curves if tested not in pair]
        scored = [next(kind for kind in FOLDS if kind != tested and kind not in pair) for pair in inner]
        return fmean(curves[pair][str(steps)][kind] for pair, kind in zip(inner, scored, strict=True))

    return max(STEPS, key=mean)


def merged(folds: list[dict[str, Any]], chosen: dict[str, int]) -> dict[str, Any]:
    """One result of the four folds' results: scores are means over all pairs, each counted once."""
    first, pairs = folds[0], sum(fold["pairs"] for fold in folds)
    kept = {key for key in first["pck"] if key.count("/") == 0 or key.endswith("/image")}
    pck = {key: sum(fold["pairs"] * fold["pck"][key] for fold in folds) / pairs for key in sorted(kept)}
    breakdown = {"category": {name: row for fold in folds for name, row in fold["breakdown"]["category"].items()}}
    rule = {"kinds": "each in turn is tested, the others are learnt from"}
    trained = first["trained"] and first["trained"] | {"options": rule, "max_steps": chosen, "steps": chosen}
    # these runs share the machine with others: their times are none
    costs = {"ms_per_pair": None, "peak_memory_mb": max(fold["peak_memory_mb"] for fold in folds)}
    checkpoints = {"checkpoint": trained and "one a fold", "checkpoint_sha256": None}
    same = {"dataset_options": rule, "trained": trained, "pairs": pairs, "pck": pck, "breakdown": breakdown}
    return first | same | costs | checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["synthetic", "zero_shot", "leave_one_out", "costs"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--ablations", choices=["yes", "no"], default="yes")
    parser.add_argument("--heads", nargs="+", choices=list(REAL), default=list(REAL), help="of leave_one_out")
    parser.add_argument("--data_root", default=str(ROOT / "data"), help="the absolute folder that holds PF-WILLOW/")
    args = parser.parse_args()
    if args.study == "synthetic":
        synthetic(args.seeds, args.backbones, args.ablations == "yes")
    elif args.study == "zero_shot":
        zero_shot(args.data_root)
    elif args.study == "costs":
        costs()
    else:
        leave_one_out(args.data_root, args.seeds, args.heads)


if __name__ == "__main__":
    main()
