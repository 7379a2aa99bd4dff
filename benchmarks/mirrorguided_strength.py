"""PCK of the trained MirrorGuided at several strengths, from the untrained head to the trained one (its eq. 11).

    python benchmarks/mirrorguided_strength.py <folder of CUB_200_2011/ and PF-WILLOW/> [--seeds 0 1 2]

Scores the checkpoints that `benchmarks/study.py cub_frozen --heads mirrorguided` left in runs/study: trained on birds,
so `synthetic` and `pfwillow` have objects that the head has never seen. A strength is chosen on the validation pairs of
`cub` and `synthetic`. Writes benchmarks/results/mirrorguided_strength.csv.
"""

import argparse
import logging
from dataclasses import replace

from lightning.pytorch import Trainer

import corrzoo
from corrzoo.data.module import PairsDataModule
from corrzoo.scoring.pck import ALPHAS
from corrzoo.tables import write_csv
from study import RESULTS, RUNS, Run, learning_rate

STRENGTHS = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
SPLITS = (("cub", "val"), ("synthetic", "val"), ("cub", "test"), ("pfwillow", "test"))
OPTIONS = {"synthetic": {"length": {"val": 400}}}


def scores(seed: int, strength: float, root: str) -> dict[str, str]:
    """PCK by dataset, split and alpha."""
    run = Run("cub_frozen", "mirrorguided", seed, 10_000)
    model = corrzoo.load(replace(run, lr=learning_rate(run)).folder / "last.ckpt")
    model.strength = strength
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=RUNS / "strength", **quiet)
    row = {}
    for name, split in SPLITS:
        data = PairsDataModule(name, name, [name], root, image_size=96, num_workers=0, options=OPTIONS)
        (found,) = (trainer.validate if split == "val" else trainer.test)(model, data, verbose=False)
        row |= {f"{name} {split}@{alpha:g}": f"{found[f'{split}/pck@{alpha:g}']:.1f}" for alpha in ALPHAS}
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = [{"seed": seed, "strength": strength} for seed in args.seeds for strength in STRENGTHS]
    rows = [case | scores(**case, root=args.root) for case in cases]
    write_csv(RESULTS / "mirrorguided_strength.csv", rows)
