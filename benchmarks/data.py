"""Opening and reading a dataset of SPair-71k's size and shape, against the way that released code does it.

1,800 JPEG images of 500 x 375 pixels and an annotation for each of 53,340 training pairs are written to a temporary
folder, so no data is needed. Writes benchmarks/results/data.csv. The times are CPU seconds of one process, whose files
are in the system's cache, taken by turns; ratios are medians over the rounds. Run it as `python benchmarks/data.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from corrzoo.data import PairDataset, create_dataset
from corrzoo.data.readers.spair import CATEGORIES
from corrzoo.tables import write_csv
from measuring import RESULTS, timed

SPLITS = {"trn": (range(0, 55), 53_340), "val": (range(55, 73), 5_384), "test": (range(73, 100), 12_234)}
"""By split, its images among the 100 of a category, and its number of pairs, which give SPair-71k's counts."""
SIZE, BATCH = 224, 16
"""Side of the network image, and pairs per batch (ViTSC 5.2)."""


def write(root: Path, splits: list[str]) -> None:
    """Write SPair-71k's folders, with images as large on disk as photographs and the first pairs of each category."""
    home, rng = root / "SPair-71k", np.random.default_rng(0)
    numbers = [k for split in splits for k in SPLITS[split][0]]
    for category in CATEGORIES:
        (home / "JPEGImages" / category).mkdir(parents=True)
        for k in numbers:
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
            grain = rng.normal(0, 9, (375, 500, 1))
            image = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
            image.save(home / "JPEGImages" / category / f"2008_{k:06d}.jpg", quality=90)
    for split in splits:
        (home / "PairAnnotation" / split).mkdir(parents=True)
        names, (images, count) = [], SPLITS[split]
        for c, category in enumerate(CATEGORIES):
            share = len(range(c, count, len(CATEGORIES)))
            for src, trg in islice(permutations(images, 2), share):
                name = f"{len(names) + 1:06d}-2008_{src:06d}-2008_{trg:06d}:{category}"
                note = json.dumps(annotation(name, src, trg, category, rng))
                (home / "PairAnnotation" / split / f"{name}.json").write_text(note)
                names.append(name)
        for layout, listed in (("large", names), ("small", names[::5])):
            (home / "Layout" / layout).mkdir(parents=True, exist_ok=True)
            (home / "Layout" / layout / f"{split}.txt").write_text("".join(f"{name}\n" for name in listed))


def annotation(name: str, src: int, trg: int, category: str, rng: np.random.Generator) -> dict[str, Any]:
    """A random annotation in SPair-71k's format, with 4 to 14 keypoints."""
    n = int(rng.integers(4, 15))
    sides = {
        f"{side}_{key}": value
        for side, k in (("src", src), ("trg", trg))
        for key, value in (
            ("imname", f"2008_{k:06d}.jpg"),
            ("imsize", [500, 375, 3]),
            ("bndbox", [20, 30, 480, 350]),
            ("pose", "Left"),
            ("kps", rng.integers(30, 350, (n, 2)).tolist()),
        )
    }
    flags = dict.fromkeys(("mirror", "viewpoint_variation", "scale_variation", "truncation", "occlusion"), 1)
    number = int(name.split("-")[0])
    named = {"pair_id": number, "filename": name, "category": category, "kps_ids": [str(k) for k in range(n)]}
    return named | sides | flags


class PublishedWay(Dataset[dict[str, Any]]):
    """BASELINE, not corrzoo: each start parses every annotation into tensors; each pair decodes both its images.

    Written from the description of what released repositories do, with padded keypoints as a batch needs them.
    """

    def __init__(self, root: Path, split: str, layout: str = "large") -> None:
        self.home = root / "SPair-71k"
        names = (self.home / "Layout" / layout / f"{split}.txt").read_text().splitlines()
        self.notes, self.src_kps, self.trg_kps, self.src_box, self.trg_box = [], [], [], [], []
        for name in names:
            with open(self.home / "PairAnnotation" / split / f"{name}.json") as file:
                note = json.load(file)
            self.notes.append(note)
            self.src_kps.append(torch.tensor(note["src_kps"]).float())
            self.trg_kps.append(torch.tensor(note["trg_kps"]).float())
            self.src_box.append(torch.tensor(note["src_bndbox"]).float())
            self.trg_box.append(torch.tensor(note["trg_bndbox"]).float())

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        note, n = self.notes[i], len(self.src_kps[i])
        sample: dict[str, Any] = {"index": i, "n": n, "src_box": self.src_box[i], "trg_box": self.trg_box[i]}
        for side, kps in (("src", self.src_kps[i]), ("trg", self.trg_kps[i])):
            image = Image.open(self.home / "JPEGImages" / note["category"] / note[f"{side}_imname"]).convert("RGB")
            size = torch.tensor(image.size)
            pixels = np.array(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            scaled = kps * (SIZE / size)
            sample[f"{side}_img"] = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
            sample[f"{side}_kps"] = torch.cat([scaled, torch.full((40 - n, 2), -1.0)])
            sample[f"{side}_size"] = size
        return sample


def rate(dataset: Any, pairs: int, collate: Callable[..., Any] | None = None) -> float:
    """Images read per CPU second, in shuffled batches."""
    loader = DataLoader(dataset, BATCH, sampler=RandomSampler(dataset, num_samples=pairs), collate_fn=collate)
    return 2 * pairs / timed(lambda: [None for _ in loader])[0]


def resident() -> dict[str, float]:
    """Memory of this process in MB: its own, and pages of files that the system can reclaim."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")}


def open_ours(root: Path, layout: str = "large") -> PairDataset:
    """The training split as corrzoo opens it."""
    return create_dataset("spair71k", root, "trn", size=SIZE, layout=layout)


def probe(root: Path, way: str, layout: str) -> dict[str, float]:
    """Memory that opening a dataset and reading 500 pairs adds to a process."""
    before = resident()
    if way == "published":
        opened: Any = PublishedWay(root, "trn", layout)
    else:
        opened = open_ours(root, layout)
        opened.pack()
    for i in torch.randperm(len(opened))[:500].tolist():
        opened[i]
    return {name: value - before[name] for name, value in resident().items()} | {"pairs": len(opened)}


def memory(root: Path, way: str) -> tuple[float, float]:
    """Memory in MB per 10,000 pairs, and of all pairs."""
    found = {}
    for layout in ("small", "large"):
        command = [sys.executable, __file__, "--probe", way, "--layout", layout, "--root", str(root)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[layout] = json.loads(said.splitlines()[-1])
    small, large = found["small"], found["large"]
    return (large["RssAnon"] - small["RssAnon"]) / (large["pairs"] - small["pairs"]) * 1e4, large["RssAnon"]


def row(
    what: str, unit: str, published: list[float], ours: list[float], more_is_better: bool, how: str
) -> dict[str, Any]:
    """Row of the table. The ratio is the median over the rounds; above 1, corrzoo is better."""
    pairs = zip(published, ours, strict=True)
    ratio = statistics.median(b / a if more_is_better else a / b for a, b in pairs)
    middle = [statistics.median(values) for values in (published, ours)]
    print(f"{what}: {middle[0]:.4g} -> {middle[1]:.4g} {unit}, x {ratio:.3g}", flush=True)
    return {"what": what, "unit": unit, "published way": f"{middle[0]:.4g}", "corrzoo": f"{middle[1]:.4g}"} | {
        "ratio": f"{ratio:.3g}",
        "how": how,
    }


def measure(root: Path, rounds: int, sample: int) -> list[dict[str, Any]]:
    """Measure all rows."""
    opening, ours = timed(open_ours, root)
    packing, _ = timed(ours.pack)
    print(f"first start: {opening:.1f} s to parse, {packing:.1f} s to pack {len(ours.images)} images", flush=True)
    starts: dict[str, list[float]] = {"published": [], "corrzoo": []}
    rates: dict[str, list[float]] = {"published": [], "corrzoo": []}
    for _ in range(rounds):
        seconds, theirs = timed(PublishedWay, root, "trn")
        starts["published"].append(seconds)
        starts["corrzoo"].append(timed(open_ours, root)[0])
        rates["published"].append(rate(theirs, sample))
        rates["corrzoo"].append(rate(ours, 20 * sample, PairDataset.collate))
    open_ours(root, "small").pack()  # the probes are to find the caches
    added = {way: memory(root, way) for way in ("published", "corrzoo")}
    each, whole = ([[added[way][k]] for way in ("published", "corrzoo")] for k in (0, 1))
    once = f"corrzoo's first start parses in {opening:.1f} s and packs in {packing:.1f} s; "
    once += "later starts check the list and the time of the annotations' folder"
    return [
        row("start-up on 53,340 pairs", "CPU s", starts["published"], starts["corrzoo"], False, once),
        row(
            "images read, second epoch", "images/CPU s", rates["published"], rates["corrzoo"], True,
            f"{SIZE} px, batches of {BATCH}, no workers; {sample} pairs a round, corrzoo {20 * sample}",
        ),
        row("memory of 10,000 further pairs", "MB", *each, False, "resident and not of a file"),
        row("memory of all pairs", "MB", *whole, False, "beyond an empty process; 500 pairs were read"),
    ]  # fmt: skip


def main() -> None:
    """Write the dataset, measure, keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=100, help="pairs of the published way per round")
    parser.add_argument("--root", type=Path, help="folder to write the dataset to, or to read it from")
    parser.add_argument("--probe", choices=["published", "corrzoo"], help="internal, of the script's own processes")
    parser.add_argument("--layout", default="large", help="internal, of the script's own processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.probe:
        print(json.dumps(probe(args.root, args.probe, args.layout)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = args.root or Path(folder)
        os.environ["CORRZOO_CACHE"] = str(root / "cache")
        if not (root / "SPair-71k").exists():
            write(root, ["trn"])
        write_csv(RESULTS / "data.csv", measure(root, args.rounds, args.sample))


if __name__ == "__main__":
    main()
