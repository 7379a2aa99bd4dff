"""The study: on equal terms, which head helps, and which part of it, with what.

    python benchmarks/study.py synthetic          every head and its main ablations, on drawn pairs
    python benchmarks/study.py zero_shot          real weights without any training, on PF-WILLOW
    python benchmarks/study.py leave_one_out      every head learns from three kinds of PF-WILLOW, and meets the fourth

Each run is one `lightning fit` and one `lightning test` with the YAMLs that this prints, in a folder under
runs/study/; its result goes to benchmarks/results/<study>/<run>.json. What is there already is not run again.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import corrzoo.cli  # before the first fork, so that no run imports it anew
from corrzoo import commands

ROOT = Path(__file__).resolve().parents[1]
RESULTS, CONFIGS = ROOT / "benchmarks" / "results", ROOT / "zoo_configs"

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


def lightning(folder: Path, command: str, stack: Iterable[str], *options: str) -> None:
    """Run `lightning <command>` in a folder and a process of its own. `stack` names files of zoo_configs, and options.

    Raises:
        SystemExit: when it fails.
    """
    args = [item if item.startswith("--") else f"--config={CONFIGS / item}" for item in stack]
    shown = [item if item.startswith("--") else f"--config zoo_configs/{item}" for item in stack]
    print("lightning", command, *shown, *options, flush=True)
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
    commands.main(args)


def run(into: Path, folder: Path, name: str, label: str, stack: Iterable[str], seed: int, *, fit: bool = True) -> None:
    """Train, unless `fit` is false, and test; the result goes `into` a file."""
    if into.exists():
        return
    began = time.perf_counter()
    common = ("--trainer.logger=false", f"--seed_everything={seed}", "--trainer.enable_progress_bar=false")
    common += ("--trainer.callbacks=corrzoo.callbacks.ResultsWriter", f"--trainer.callbacks.folder={name}")
    common += (f"--trainer.callbacks.label={label}",)
    if fit:
        lightning(folder, "fit", stack, *common, f"--checkpoint.dirpath={name}")
    tested = (f"--ckpt_path={name}/last.ckpt",) if fit else ()
    lightning(folder, "test", stack, *common, *tested)
    (result,) = (folder / name).glob("*.json")
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text(result.read_text())
    scores = json.loads(into.read_text())["pck"]
    print(f"{into.stem}: " + " / ".join(f"{scores[f'pck@{alpha}']:.1f}" for alpha in (0.05, 0.1, 0.15)), end=", ")
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


def synthetic(seeds: list[int], backbones: list[str], ablations: bool) -> None:
    """Every head on the features that the Baseline's recipe leaves; ablations on the first backbone."""
    results = RESULTS / "synthetic"
    for backbone in backbones:
        for seed in seeds:
            folder, extra = ROOT / "runs" / "study" / "synthetic" / backbone / str(seed), BACKBONES[backbone]

            def one(name: str, label: str, stack: Iterable[str], fit: bool = True) -> None:
                run(results / f"{name}-{backbone}-{seed}.json", folder, name, label, stack, seed, fit=fit)  # noqa: B023

            tuned = (*SIZES["baseline"], *extra, "study/features.yaml")
            one("features", "whole backbone fine-tuned", tuned)
            save_features(folder / "features" / "last.ckpt", folder / FEATURES)
            untouched = (*SIZES["baseline"], *extra, "--model.weights=pretrained")
            one("imagenet", "ImageNet features, untrained", untouched, fit=False)
            for head, stack in SIZES.items():
                one(head, "", (*stack, *extra))
                for ablation in ABLATIONS.get(head, ()) if ablations else ():
                    name = f"{head}_{ablation}"
                    one(name, name, (*stack, *extra, f"ablation/{name}.yaml"))
            if ablations:
                one("gsf_widths", "5.1's 7 and 5 read as widths", (*SIZES["gsf"], *extra, *WIDTHS))


def save_features(checkpoint: Path, path: Path) -> None:
    """What a run's backbone has learnt, as a file for --model.weights."""
    from safetensors.torch import save_file

    if not path.exists():
        network = corrzoo.load(checkpoint).backbone.trunk.model
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["synthetic", "zero_shot", "leave_one_out"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--ablations", choices=["yes", "no"], default="yes")
    parser.add_argument("--data_root", default=str(ROOT / "data"), help="the folder that holds PF-WILLOW/")
    args = parser.parse_args()
    if args.study == "synthetic":
        synthetic(args.seeds, args.backbones, args.ablations == "yes")


if __name__ == "__main__":
    main()
