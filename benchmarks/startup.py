"""How long a dataset takes to start: SPair-71k's 53,340 training pairs, parsed and from the cache of annotations.

Writes annotations of SPair-71k's number and form to a temporary folder, so it needs no data. Run it as
`python benchmarks/startup.py`, or with `--pairs N` for fewer.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from corrzoo.data import create_dataset
from corrzoo.data.spair import CATEGORIES


def write(root: Path, pairs: int, images: int = 100) -> None:
    """SPair-71k's folders with `images` tiny images a category and `pairs` training pairs of 8 keypoints."""
    home = root / "SPair-71k"
    for category in CATEGORIES:
        (home / "JPEGImages" / category).mkdir(parents=True)
        for k in range(images):
            Image.new("RGB", (50, 40)).save(home / "JPEGImages" / category / f"2008_{k:06d}.jpg")
    (home / "PairAnnotation" / "trn").mkdir(parents=True)
    (home / "Layout" / "large").mkdir(parents=True)
    kps = [[4 * k, 5 * k] for k in range(8)]
    with open(home / "Layout" / "large" / "trn.txt", "w") as lines:
        for number in range(pairs):
            category = CATEGORIES[number * len(CATEGORIES) // pairs]
            src, trg = (f"2008_{k % images:06d}" for k in (number, number // images + number + 1))
            name = f"{number + 1:06d}-{src}-{trg}:{category}"
            sides = {
                f"{side}_{key}": value
                for side, stem in (("src", src), ("trg", trg))
                for key, value in (
                    ("imname", f"{stem}.jpg"),
                    ("imsize", [50, 40, 3]),
                    ("bndbox", [1, 1, 50, 40]),
                    ("pose", "Left"),
                    ("kps", kps),
                )
            }
            flags = dict.fromkeys(("mirror", "viewpoint_variation", "scale_variation", "truncation", "occlusion"), 1)
            pair = {"pair_id": number + 1, "filename": name, "category": category, "kps_ids": list("01234567")}
            (home / "PairAnnotation" / "trn" / f"{name}.json").write_text(json.dumps(pair | sides | flags))
            lines.write(f"{name}\n")


def main() -> None:
    """Write, start twice, say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=53_340)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["CORRZOO_CACHE"] = str(root / "cache")
        write(root, parser.parse_args().pairs)
        for start in ("first", "second"):
            before = time.perf_counter()
            dataset = create_dataset("spair71k", root, "trn")
            print(f"{start} start on {len(dataset):,} pairs: {time.perf_counter() - before:.2f} s")
        before = time.perf_counter()
        shuffled = torch.randperm(len(dataset))[:1000].tolist()
        for i in shuffled:
            dataset.record(i)
        print(f"a record: {(time.perf_counter() - before) / len(shuffled) * 1e6:.0f} us")


if __name__ == "__main__":
    main()
