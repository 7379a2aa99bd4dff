"""Train MirrorGuided without each of its parts, or with another in its place, on the same pairs.

    python benchmarks/mirrorguided_ablations.py <folder of CUB_200_2011/>

Photographs of birds with frozen features, as `cub_frozen` of benchmarks/study.py. Each row sees as many pairs as a
learning rate is tried for, at the whole head's rate, and is scored on validation pairs.
Writes benchmarks/results/mirrorguided_ablations.csv. Rows that are there are skipped.
"""

import argparse
import csv
from dataclasses import replace
from pathlib import Path

from study import RESULTS, Run, learning_rate, short, train

OUT = RESULTS / "mirrorguided_ablations.csv"
PARTS = ("no_mirror", "fixed_guidance", "no_consensus_no_guidance", "no_consensus", "epe", "rows_and_epe")
ROWS = ("", *PARTS, "one_layer", "four_layers", "narrow")
"""Files of zoo_configs/ablation/mirrorguided; the first row is the whole head."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", type=Path)
    arguments = parser.parse_args()
    args = argparse.Namespace(data_root=arguments.data_root.absolute(), device="cpu", option=[])
    whole = Run("cub_frozen", "mirrorguided", 0, 10_000)
    whole = short(replace(whole, lr=learning_rate(whole)))
    done = {row["ablation"] for row in csv.DictReader(OUT.open())} if OUT.exists() else set()
    for ablation in ROWS:
        if ablation not in done:
            run = replace(whole, ablation=ablation)
            curve = train(run, args, scored=())
            with OUT.open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if not file.tell():
                    writer.writerow(["ablation", "pairs", "lr", *curve[str(run.pairs)]])
                scores = [f"{value:.2f}" for value in curve[str(run.pairs)].values()]
                writer.writerow([ablation, run.pairs, run.lr, *scores])
