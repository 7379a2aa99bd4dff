"""Choose the constants of MirrorGuided on validation pairs, one option after the other, without training.

    python benchmarks/mirrorguided_constants.py <folder that holds CUB_200_2011/>

EfficientNet-Lite0 with ImageNet weights (extra `offline`), 320 px. No pair of a test split is read. The score is the
mean PCK@.10 of three kinds of pairs: `cub` val (400), those of them in which both birds face the same way, and
`synthetic` val (200). The second kind stands for objects that keep their pose: these must not be mirrored. Features are
computed once; half an hour on one CPU core. Writes benchmarks/results/mirrorguided_constants.csv.
"""

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.geometry import resize_points
from corrzoo.heads import MirrorGuided
from corrzoo.scoring.pck import ALPHAS, PCK
from corrzoo.tables import write_csv
from corrzoo.types import Features, Pair
from measuring import RESULTS

OUT = RESULTS / "mirrorguided_constants.csv"
SIZE = 320
LENGTHS = {"cub": 400, "synthetic": 200}
VALUES: dict[str, list[Any]] = {
    "consensus": [0.0, 0.7, 1.0, 1.5],
    "rounds": [1, 2, 3],
    "floor": [0.0, 0.25, 0.5, 0.75],
    "rho": [0.8, 0.9, 0.95],
    "c_p": [1.0, 1.5, 2.0, 3.0],
    "c_m": [2.0, 3.0, 5.0, 7.0],
}
"""Candidates of each option, in the order in which they are scanned."""
START: dict[str, Any] = {"rounds": 2, "floor": 0.5, "rho": 0.9, "c_p": 1.5, "c_m": 3.0}
ORDER = [*VALUES, "consensus"]
MARGINS = [1.0, 1.02, 1.04, 1.05, 1.06, 1.07, 1.08, 1.1, 1.12, 1e9]
"""Every candidate is scored with its best margin, as the supports depend on all options. 1e9 never mirrors."""


class Kind(NamedTuple):
    """Validation pairs, each with the prepared features of its images."""

    pairs: list[tuple[Pair, Features, Features]]
    same: list[bool]  # whether the objects face the same way


def faces_the_same_way(pair: Pair) -> bool:
    """Whether the affine map fitted to the keypoints keeps the orientation."""
    src, trg = (kps[0][pair.kps_mask[0]].double() for kps in (pair.src_kps, pair.trg_kps))
    fit = torch.linalg.lstsq(src - src.mean(0), trg - trg.mean(0)).solution
    return bool(torch.linalg.det(fit) > 0)


@torch.no_grad()
def load(model: MirrorGuided, name: str, root: str) -> Kind:
    """Pairs of a validation split, and features by image number."""
    dataset = corrzoo.create_dataset(name, root, "val", SIZE, length=LENGTHS[name])
    pairs, known = [PairDataset.collate([dataset[i]]) for i in range(len(dataset))], {}

    def features(image: Tensor, number: int) -> Features:
        if number < 0 or number not in known:
            known[number] = model.prepare(model.backbone(image))
        return known[number]

    seen = [(p, features(p.src_img, int(p.src_id)), features(p.trg_img, int(p.trg_id))) for p in pairs]
    return Kind(seen, [faces_the_same_way(p) for p in pairs])


@torch.no_grad()
def score(model: MirrorGuided, kind: Kind, margins: list[float]) -> list[tuple[list[float], float]]:
    """For each margin, PCK@.05, .10 and .15 of all pairs, and @.10 of those that face the same way."""
    metrics = [(PCK("default:bbox", ALPHAS), PCK("default:bbox", (0.1,))) for _ in margins]
    for (pair, src, trg), same in zip(kind.pairs, kind.same, strict=True):
        plain, mirrored, ratio = model.hypotheses(src, trg, pair.src_kps)
        found = [resize_points(model.read(s, trg).double(), (SIZE, SIZE), pair.trg_size) for s in (plain, mirrored)]
        for margin, (every, kept) in zip(margins, metrics, strict=True):
            points = found[int(ratio.item() > margin)]
            every.update(points, pair)
            if same:
                kept.update(points, pair)
    return [
        ([float(every.compute()[f"pck@{a}"]) for a in ALPHAS], float(kept.compute()["pck@0.1"]))
        for every, kept in metrics
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    root = parser.parse_args().root
    levels = ["blocks.4.2", "blocks.5.2"]
    model = corrzoo.create_matcher("MirrorGuided", "efficientnet_lite0", levels=levels, finetune="none", **START).eval()
    assert isinstance(model, MirrorGuided)
    kinds = {name: load(model, name, root) for name in LENGTHS}
    rows: list[dict[str, Any]] = []
    for option in ORDER:
        rows += scan(model, kinds, option)
        write_csv(OUT, rows)


def scan(model: MirrorGuided, kinds: dict[str, Kind], option: str) -> list[dict[str, Any]]:
    """Score each value of an option at each margin, and set the best."""
    rows: list[dict[str, Any]] = []
    for value in VALUES[option]:
        setattr(model, option, value)
        cub, synthetic = (score(model, kind, MARGINS) for kind in kinds.values())
        for margin, (all_cub, same), (drawn, _) in zip(MARGINS, cub, synthetic, strict=True):
            row = {"option": option, "value": value, "margin": margin}
            row |= {f"cub@{a}": f"{v:.1f}" for a, v in zip(ALPHAS, all_cub, strict=True)}
            row |= {"cub same way@0.1": f"{same:.1f}", "synthetic@0.1": f"{drawn[1]:.1f}"}
            rows.append(row | {"mean": f"{(all_cub[1] + same + drawn[1]) / 3:.2f}", "chosen": ""})
        print(*max(rows[-len(MARGINS) :], key=lambda row: float(row["mean"])).values(), flush=True)
    best = max(rows, key=lambda row: float(row["mean"]))
    best["chosen"] = "yes"
    setattr(model, option, best["value"])
    return rows


if __name__ == "__main__":
    main()
