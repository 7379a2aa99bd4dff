"""Tiny datasets in every layout on disk that the readers support.

Images are grey with a red square of 8 pixels around each keypoint, so that tests can see where a keypoint is in a
sample. Each writer returns what it wrote, as plain Python, for comparison. `write_synthetic_spair` writes a dataset of
rendered objects, which can be trained on.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from corrzoo.data.synthetic.drawing import OBJECTS, View, render, view
from corrzoo.data.synthetic.pairs import difficulty

SQUARE = 4
"""Half the side of the square around a keypoint."""

SPAIR_KPS = {  # image -> (size, keypoints); the squares do not overlap
    "aeroplane/2008_000001.jpg": ((64, 48), [[10, 12], [30, 20], [50, 40]]),
    "aeroplane/2008_000002.jpg": ((48, 60), [[8, 8], [24, 30], [40, 52]]),
    "aeroplane/2008_000003.jpg": ((80, 40), [[12, 10], [40, 20], [70, 30]]),
    "cat/2009_000004.jpg": ((50, 50), [[10, 10], [40, 40], [25, 25]]),
    "cat/2009_000005.jpg": ((60, 44), [[15, 9], [45, 35], [30, 22]]),
}


def draw(path: Path, size: tuple[int, int], kps: Iterable[Sequence[float]] = ()) -> None:
    """Write an image of size (w, h) with a red square around each keypoint that is a whole number."""
    pixels = np.full((size[1], size[0], 3), 100, dtype=np.uint8)
    for x, y in kps:
        if np.isfinite([x, y]).all():
            top, left = max(int(y) - SQUARE, 0), max(int(x) - SQUARE, 0)
            pixels[top : int(y) + SQUARE, left : int(x) + SQUARE] = (255, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def spair_annotation(src: str, trg: str, number: int, n: int = 3) -> dict:
    """The pair annotation of two images of SPAIR_KPS, with the first n keypoints."""
    (src_size, src_kps), (trg_size, trg_kps) = SPAIR_KPS[src], SPAIR_KPS[trg]
    category = src.split("/")[0]
    return {
        "pair_id": number,
        "filename": f"{number:06d}-{Path(src).stem}-{Path(trg).stem}:{category}",
        "src_imname": Path(src).name,
        "trg_imname": Path(trg).name,
        "src_imsize": [*src_size, 3],
        "trg_imsize": [*trg_size, 3],
        "src_bndbox": [1, 1, src_size[0], src_size[1] - number],
        "trg_bndbox": [2, 1, trg_size[0], trg_size[1] - number],
        "category": category,
        "src_pose": "Left",
        "trg_pose": "Frontal",
        "src_kps": src_kps[:n],
        "trg_kps": trg_kps[:n],
        "kps_ids": [str(k) for k in range(n)],
        "mirror": 0,
        "viewpoint_variation": number % 3,
        "scale_variation": 1,
        "truncation": number % 4,
        "occlusion": 3,
    }


def write_spair(root: Path, colon: str = ":") -> dict[str, list[dict]]:
    """SPair-71k with 5 images: trn has 4 pairs (2 in the small layout), val 2, test 3. Returns them by split.

    It has no image annotations.
    """
    home = root / "SPair-71k"
    for name, (size, kps) in SPAIR_KPS.items():
        draw(home / "JPEGImages" / name, size, kps)
    planes, cats = list(SPAIR_KPS)[:3], list(SPAIR_KPS)[3:]
    splits = {
        "trn": [
            (planes[0], planes[1], 1, 3),
            (planes[1], planes[0], 2, 3),
            (planes[0], planes[2], 5, 2),
            (*cats, 7, 1),
        ],
        "val": [(planes[2], planes[1], 1, 2), (cats[1], cats[0], 3, 3)],
        "test": [(planes[1], planes[2], 1, 3), (planes[2], planes[0], 2, 1), (*cats, 4, 2)],
    }
    written = {}
    for split, pairs in splits.items():
        written[split] = [spair_annotation(*pair) for pair in pairs]
        names = [pair["filename"] for pair in written[split]]
        for name, pair in zip(names, written[split], strict=True):
            path = home / "PairAnnotation" / split / f"{name.replace(':', colon)}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(pair))
        for layout, part in (("large", names), ("small", names[: len(names) // 2])):
            path = home / "Layout" / layout / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{name}\n" for name in part))
    return written


def write_synthetic_spair(
    root: Path, pairs_per_split: int = 200, images_per_category: int = 10, size: int = 256
) -> Path:
    """SPair-71k's layout with images of synthetic objects. Returns the dataset's folder.

    Each category has the same share of a split's pairs; every fifth pair is also in the small layout. No image is in
    two splits.
    """
    home = root / "SPair-71k"
    for s, split in enumerate(("trn", "val", "test")):
        rng = np.random.default_rng([0, s])
        pairs: list[dict[str, Any]] = []
        for c, category in enumerate(OBJECTS):
            views = [view(category, size, rng) for _ in range(images_per_category)]
            notes = [_image_note(category, f"2026_{s + 1}{c + 1}{k:04d}", v) for k, v in enumerate(views)]
            for note, v in zip(notes, views, strict=True):
                path = home / "JPEGImages" / category / note["filename"]
                path.parent.mkdir(parents=True, exist_ok=True)
                render(v).save(path, quality=95)
                _write_text(home / "ImageAnnotation" / category / f"{path.stem}.json", json.dumps(note))
            ordered = rng.permutation(list(permutations(range(images_per_category), 2))).tolist()
            for i, j in ordered[: len(range(c, pairs_per_split, len(OBJECTS)))]:
                flags = difficulty(views[i], views[j]) | {"mirror": int(views[i].mirrored != views[j].mirrored)}
                pairs.append(_pair_note(len(pairs) + 1, notes[i], notes[j], flags))
        for pair in pairs:
            _write_text(home / "PairAnnotation" / split / f"{pair['filename']}.json", json.dumps(pair))
        for layout, part in (("large", pairs), ("small", pairs[::5])):
            _write_text(home / "Layout" / layout / f"{split}.txt", "".join(f"{pair['filename']}\n" for pair in part))
    return home


def _image_note(category: str, stem: str, v: View) -> dict[str, Any]:
    """Image annotation. Keypoints are whole pixels inside the image; boxes are counted from 1 as in PASCAL VOC."""
    w, h = v.size
    kps = np.clip(np.rint(v.kps), 0, (w - 1, h - 1)).astype(int).tolist()
    return {
        "filename": f"{stem}.jpg",
        "image_width": w,
        "image_height": h,
        "category": category,
        "pose": "Left" if v.mirrored else "Right",
        "bndbox": np.clip(np.rint(v.box), 1, (w, h, w, h)).astype(int).tolist(),
        "kps": {str(k): kps[k] if v.visible[k] else None for k in range(len(kps))},
    }


def _pair_note(number: int, src: dict[str, Any], trg: dict[str, Any], flags: dict[str, int]) -> dict[str, Any]:
    """Pair annotation, from the annotations of its images."""
    both = [k for k in src["kps"] if src["kps"][k] and trg["kps"][k]]
    stems = "-".join(Path(note["filename"]).stem for note in (src, trg))
    pair = {"pair_id": number, "filename": f"{number:06d}-{stems}:{src['category']}", "category": src["category"]}
    for side, note in (("src", src), ("trg", trg)):
        pair |= {
            f"{side}_imname": note["filename"],
            f"{side}_imsize": [note["image_width"], note["image_height"], 3],
            f"{side}_bndbox": note["bndbox"],
            f"{side}_pose": note["pose"],
            f"{side}_kps": [note["kps"][k] for k in both],
        }
    varied = {f"{name}_variation": flags.pop(name) for name in ("viewpoint", "scale")}
    return pair | {"kps_ids": both} | varied | flags


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_spair_u(root: Path, inside: str = "SPair-U/PairAnnotation") -> list[dict]:
    """SPair-U beside the images of `write_spair`: 3 pairs, the second of which shares no keypoint."""
    planes, cats = list(SPAIR_KPS)[:3], list(SPAIR_KPS)[3:]
    written = [
        spair_annotation(planes[1], planes[2], 1, 2) | {"src_kps": [[3, 4], [5, 6]], "trg_kps": [[7, 8], [9, 10]]},
        spair_annotation(planes[2], planes[0], 2, 0),
        spair_annotation(*cats, 4, 1) | {"src_kps": [[11, 12]], "trg_kps": [[13, 14]]},
    ]
    folder = root / inside / "test"
    folder.mkdir(parents=True)
    for pair in reversed(written):
        (folder / f"{pair['filename']}.json").write_text(json.dumps(pair))
    return written


AP10K_ANIMALS = {  # image -> (size, box as left, top, width, height)
    "Bovidae/antelope/000000000007": ((60, 40), [5, 4, 50, 30]),
    "Bovidae/antelope/000000000012": ((50, 50), [0, 0, 49.5, 40]),
    "Bovidae/bison/000000000101": ((40, 64), [2.5, 3, 30, 60]),
    "Canidae/dog/000000000205": ((48, 48), [1, 1, 20, 40]),
}


def write_ap10k(root: Path) -> dict[str, list[list[int]]]:
    """AP-10K as GeoAware-SC's notebook leaves it: a pair for each subset. Returns the keypoints (x, y, v) by image."""
    home, random, kps = root / "ap-10k", np.random.default_rng(0), {}
    for image, ((w, h), box) in AP10K_ANIMALS.items():
        points = np.column_stack([random.integers(0, w, 17), random.integers(0, h, 17), random.choice([0, 2], 17)])
        points[points[:, 2] == 0] = 0
        points[:3, 2] = 2  # three are seen everywhere
        kps[image] = points.tolist()
        draw(home / "JPEGImages" / f"{image}.jpg", (w, h))
        note = {"id": int(image[-12:]), "width": w, "height": h, "bbox": box, "keypoints": points.ravel().tolist()}
        path = home / "ImageAnnotation" / f"{image}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note | {"num_keypoints": int((points[:, 2] > 0).sum())}))
    images = list(AP10K_ANIMALS)
    for folder, (src, trg), category in (
        ("trn", (images[1], images[0]), "antelope"),
        ("test", (images[0], images[1]), "antelope"),
        ("test_cross_species", (images[1], images[2]), "Bovidae"),
        ("test_cross_family", (images[3], images[2]), "all"),
    ):
        name = f"{src.rpartition('/')[2]}-{trg.rpartition('/')[2]}:{category}.json"
        paths = {
            f"{side}_json_path": f"data/ap-10k/ImageAnnotation/{i}.json" for side, i in (("src", src), ("trg", trg))
        }
        (home / "PairAnnotation" / folder).mkdir(parents=True)
        (home / "PairAnnotation" / folder / name).write_text(json.dumps(paths, indent=4))
    return kps


NAN = float("nan")
PASCAL_KPS = {  # image -> (category, size, keypoints of which some are absent, box)
    "2008_000010": ("car", (60, 40), [[10, 10], [NAN, NAN], [30, 20], [50, 30]], [5, 5, 55, 35]),
    "2009_000020": ("car", (50, 70), [[8, 10], [20, 20], [NAN, NAN], [40, 60]], [1, 2, 50, 70]),
    "2010_000030": ("sofa", (64, 64), [[10, 10], [50, 50]], [3, 3, 60, 60]),
    "2011_000040": ("sofa", (40, 64), [[6, 10], [30, 50]], [2, 4, 38, 60]),
}
PASCAL_PAIRS = [("2008_000010", "2009_000020"), ("2010_000030", "2011_000040")]
PASCAL_NUMBERS = {"car": 7, "sofa": 18}


def write_pfpascal(root: Path, layout: str = "hpf", mats: bool = True) -> None:
    """PF-PASCAL with 2 pairs a split, and the same two mirrored in trn.

    layout "hpf": as HPF bundles it; "official": the authors' archive and lists; "ncnet": with image_pairs/.
    """
    home = root / "PF-PASCAL"
    inner = home if layout == "hpf" else home / "PF-dataset-PASCAL"
    for stem, (category, size, kps, box) in PASCAL_KPS.items():
        draw(inner / "JPEGImages" / f"{stem}.jpg", size, kps)
        if mats:
            path = inner / "Annotations" / category / f"{stem}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            scipy.io.savemat(path, {"kps": np.array(kps, dtype=float), "bbox": np.array([box], dtype=np.uint16)})
    pattern = {"hpf": "{}_pairs.csv", "official": "{}_pairs_pf_pascal.csv", "ncnet": "image_pairs/{}_pairs.csv"}[layout]
    for split in ("trn" if layout == "hpf" else "train", "val", "test"):
        rows = [
            [f"PF-dataset-PASCAL/JPEGImages/{stem}.jpg" for stem in pair] + [PASCAL_NUMBERS[PASCAL_KPS[pair[0]][0]]]
            for pair in PASCAL_PAIRS
        ]
        if split == "test":
            header = ["source_image", "target_image", "class", "XA", "YA", "XB", "YB"]
            for row, (src, trg) in zip(rows, PASCAL_PAIRS, strict=True):
                both = np.hstack([PASCAL_KPS[src][2], PASCAL_KPS[trg][2]])
                row += [";".join(map(str, column)) for column in both[np.isfinite(both).all(1)].T]
        else:
            header = ["source_image", "target_image", "class", "flip"]
            rows = [[*row, flip] for flip in ((0, 1) if split in ("trn", "train") else (0,)) for row in rows]
        _write_csv(home / pattern.format(split), header, rows)


WILLOW = ["car(G)", "car(M)", "car(S)", "duck(S)", "motorbike(G)", "motorbike(M)", "motorbike(S)"]
WILLOW += ["winebottle(M)", "winebottle(wC)", "winebottle(woC)"]


def write_pfwillow(root: Path, lists: bool = True, mats: bool = True, inner: str = "") -> dict[str, np.ndarray]:
    """PF-WILLOW with 2 images a sub-class, so 20 pairs. Returns each image's (2, 10) points by "<category>/<stem>".

    inner "PF-dataset" puts the sub-classes where the authors' archive has them.
    """
    home, points = root / "PF-WILLOW", {}
    random = np.random.default_rng(0)
    for category in WILLOW:
        for stem in ("a_001", "b_002"):
            size = (40 + 2 * len(points), 50)
            draw(home / inner / category / f"{stem}.png", size)
            points[f"{category}/{stem}"] = random.uniform(1, 40, (2, 10))
            if mats:
                scipy.io.savemat(home / inner / category / f"{stem}.mat", {"pts_coord": points[f"{category}/{stem}"]})
    if lists:
        header = ["imageA", "imageB", *(f"{side}{k}" for side in ("XA", "YA", "XB", "YB") for k in range(1, 11))]
        rows = [
            [f"PF-dataset/{a}.png", f"PF-dataset/{b}.png", *points[a].ravel(), *points[b].ravel()]
            for c in WILLOW
            for a, b in ((f"{c}/a_001", f"{c}/b_002"), (f"{c}/b_002", f"{c}/a_001"))
        ]
        _write_csv(home / "test_pairs.csv", header, rows)
    return points


def write_caltech(root: Path) -> list[tuple[list[list[float]], list[list[float]]]]:
    """Caltech-101 with 2 pairs; a vertex lies outside its image, and an image is grey. Returns the outlines."""
    home = root / "Caltech-101"
    images = home / "101_ObjectCategories"
    draw(images / "Faces" / "image_0001.jpg", (50, 40))
    draw(images / "Faces" / "image_0002.jpg", (60, 30))
    draw(images / "yin_yang" / "image_0001.jpg", (44, 44))
    Image.new("L", (30, 36), 77).save(images / "yin_yang" / "image_0002.jpg")
    outlines = [
        ([[1.5, 2], [40, 3], [20.25, 30]], [[-3, 1], [55, 2], [50, 25], [5, 28]]),
        ([[4, 4], [40, 4], [40, 40], [4, 40]], [[3, 3], [25, 5], [10, 30]]),
    ]
    rows = [
        [f"101_ObjectCategories/{category}/image_000{k}.jpg" for k in (1, 2)]
        + [number]
        + [",".join(map(str, column)) for outline in both for column in zip(*outline, strict=True)]
        for category, number, both in zip(("Faces", "yin_yang"), (1, 101), outlines, strict=True)
    ]
    header = ["source", "target", "class", "XA", "YA", "XB", "YB"]
    _write_csv(home / "test_pairs_caltech_with_category.csv", header, rows)
    return outlines


def write_cub(
    root: Path,
    species: Iterable[int] = (1, 2, 3, 5, 10, 11, 22),
    images: int = 6,
    side: int | None = None,
    share: float = 0.7,
) -> Path:
    """CUB-200-2011 with some images of some species, and each part visible in a share of them. Returns its folder.

    Images have sides of 64 to 96 pixels if `side` is not given, and red squares at their visible parts.
    """
    home, random, number = root / "CUB_200_2011", np.random.default_rng(0), 1
    (home / "parts").mkdir(parents=True)
    rows: dict[str, list[str]] = {name: [] for name in CUB_FILES}
    for n in species:
        for k in range(images):
            number += 2  # a partial copy keeps the ids of the whole dataset
            name = f"{n:03d}.Bird_{n}/Bird_{n}_{k:04d}_{number}.jpg"
            w, h = (side, side) if side else random.integers(64, 97, 2).tolist()
            parts = np.column_stack([random.integers(8, w - 8, 15), random.integers(8, h - 8, 15)]).astype(float)
            visible = random.random(15) < share
            draw(home / "images" / name, (w, h), parts[visible])
            rows["images.txt"].append(f"{number} {name}")
            rows["image_class_labels.txt"].append(f"{number} {n}")
            rows["bounding_boxes.txt"].append(f"{number} 1.0 2.5 {w - 4}.0 {h - 5}.25")
            for part, ((x, y), seen) in enumerate(zip(parts.tolist(), visible, strict=True), 1):
                rows["parts/part_locs.txt"].append(
                    f"{number} {part} {x} {y} 1" if seen else f"{number} {part} 0.0 0.0 0"
                )
    for name, lines in rows.items():
        (home / name).write_text("\n".join(lines) + "\n")
    return home


CUB_FILES = ("images.txt", "image_class_labels.txt", "bounding_boxes.txt", "parts/part_locs.txt")


def read_cub(home: Path) -> dict[int, dict]:
    """Plain reading of a copy of CUB-200-2011: name, split, box and visible parts by image id, images on disk only."""
    found: dict[int, dict] = {}
    lines = {name: (home / name).read_text("utf-8", "replace").split("\n") for name in CUB_FILES}
    cells = {name: [line.split() for line in lines[name] if line.strip()] for name in CUB_FILES}
    for line in lines["images.txt"]:
        if line:
            image, name = line.split(" ", 1)
            found[int(image)] = {"name": name, "parts": {}}
    for image, species in cells["image_class_labels.txt"]:
        n = float(species)
        found[int(float(image))]["split"] = "test" if n % 5 == 0 else "val" if n % 10 == 1 else "trn"
    for image, *box in cells["bounding_boxes.txt"]:
        x, y, w, h = map(float, box)
        found[int(float(image))]["box"] = [x, y, x + w, y + h]
    for image, part, x, y, seen in cells["parts/part_locs.txt"]:
        if float(seen) == 1:
            found[int(float(image))]["parts"][int(float(part))] = [float(x), float(y)]
    return {image: it for image, it in found.items() if os.path.isfile(home / "images" / it["name"])}


def cub_pairs(images: dict[int, dict], split: str, length: int) -> list[tuple[int, int]]:
    """The rule for pairs in plain loops: ids of source and target."""
    ids = sorted(image for image, it in images.items() if it["split"] == split and len(it["parts"]) >= 5)
    pairs: list[tuple[int, int]] = []
    drawn: set[tuple[int, int]] = set()
    k = 0
    while len(pairs) < length:
        digests = [hashlib.sha256(bytes(f"{split}:{i}", "ascii")).hexdigest() for i in (2 * k, 2 * k + 1)]
        a, b = (ids[int(digest[:16], 16) % len(ids)] for digest in digests)
        common = [part for part in range(1, 16) if part in images[a]["parts"] and part in images[b]["parts"]]
        if a != b and len(common) >= 5 and (min(a, b), max(a, b)) not in drawn:
            drawn.add((min(a, b), max(a, b)))
            pairs.append((a, b))
        k += 1
    return pairs


def _write_csv(path: Path, header: list, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
