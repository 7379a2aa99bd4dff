"""Untrained ACTR and LPMFlow with `init: paper` and `init: aligned`: PCK on synthetic test pairs, three seeds.

EfficientNet-Lite0 with ImageNet weights (extra `offline`), 96 px, 6 x 6 cells, 200 pairs; a minute on one CPU core.

    python benchmarks/aligned.py
"""

import torch

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.matcher import Matcher
from corrzoo.scoring.evaluation import predict_points
from corrzoo.scoring.pck import ALPHAS, PCK

DEPTH = {"ACTR": 2, "LPMFlow": 1}
LEVELS = ["blocks.2.1", "blocks.4.2"]


def build(head: str, init: str, seed: int) -> Matcher:
    """A head without training on a 6 x 6 grid."""
    torch.manual_seed(seed)
    options = {"levels": LEVELS, "backbone_size": 96, "depth": DEPTH[head], "init": init}
    return corrzoo.create_matcher(head, "efficientnet_lite0", **options).eval()


@torch.no_grad()
def main() -> None:
    dataset = corrzoo.create_dataset("synthetic", "", "test", 96, length=200)
    batches = [PairDataset.collate([dataset[i] for i in range(start, start + 20)]) for start in range(0, 200, 20)]
    for head in DEPTH:
        for init in ("paper", "aligned"):
            for seed in range(3):
                model, metric = build(head, init, seed), PCK("default:bbox", ALPHAS, dataset.categories)
                for pair in batches:
                    metric.update(predict_points(model, pair), pair)
                scores = metric.compute()
                print(head, init, seed, *(f"{float(scores[f'pck@{alpha}']):.1f}" for alpha in ALPHAS), flush=True)


if __name__ == "__main__":
    main()
