"""Synthetic pairs: deterministic, correctly labelled, with repeated parts that only their context tells apart."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import write_synthetic_spair

from corrzoo.data import create_dataset
from corrzoo.data.readers.spair import SPair71k
from corrzoo.data.synthetic.drawing import OBJECTS, View, render, view
from corrzoo.data.synthetic.pairs import LENGTHS, SyntheticPairs, difficulty
from corrzoo.types import ZooError


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def views() -> list[tuple[str, View]]:
    return [(category, view(category, 64, rng(c, k))) for k in range(100) for c, category in enumerate(OBJECTS)]


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def inside(point: np.ndarray, corners: np.ndarray) -> bool:
    """Ray casting, one edge after the other."""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (y1 > point[1]) != (y2 > point[1]) and point[0] < x1 + (point[1] - y1) * (x2 - x1) / (y2 - y1):
            crossings += 1
    return crossings % 2 == 1


def test_seed_split_and_index_decide_everything() -> None:
    a = SyntheticPairs("", "val", 64)
    b = SyntheticPairs("elsewhere", "val", 64, length=7)
    b[5], b[1]
    assert all(same(a[i], b[i]) for i in (0, 3, 6))
    others = [a[4], SyntheticPairs("", "val", 64, seed=1)[0], *(SyntheticPairs("", s, 64)[0] for s in ("trn", "test"))]
    assert not any(torch.equal(a[0].src_img, other.src_img) for other in others)
    assert not torch.equal(a[0].src_img, a[0].trg_img)
    given = {"trn": 1}
    assert same(SyntheticPairs("", "trn", 64, seed=given)[0], SyntheticPairs("", "trn", 64, seed=1)[0])
    assert same(SyntheticPairs("", "val", 64, seed=given)[0], a[0])


def test_each_epoch_trains_on_new_pairs_and_the_other_splits_stay() -> None:
    trn, long, val = (SyntheticPairs("", split, 32, length=n) for split, n in (("train", 3), ("trn", 9), ("val", 3)))
    before = val[1]
    for epoch in range(3):
        for dataset in (trn, val):
            dataset.set_epoch(epoch)
        for i in range(3):
            assert torch.equal(trn[i].src_img, long[3 * epoch + i].src_img)
            assert trn[i].index == i and trn[i].src_id == long[3 * epoch + i].src_id
    assert same(before, val[1])


def test_samples_are_whole() -> None:
    dataset = SyntheticPairs("", "test", (48, 64), length=40)
    samples = [dataset[i] for i in range(len(dataset))]
    ids = [int(v) for s in samples for v in (s.src_id, s.trg_id)]
    assert len(set(ids)) == len(ids)
    assert len({tuple(s.src_size.tolist()) for s in samples}) > 20 and any(
        s.src_size[0] != s.src_size[1] for s in samples
    )
    assert Counter(int(s.category) for s in samples) == dict.fromkeys(range(len(OBJECTS)), 10)
    for i, s in enumerate(samples):
        assert s.src_img.shape == (3, 48, 64) and s.src_img.dtype == torch.uint8
        assert 4 <= len(s.src_kps) == len(s.trg_kps) == len(s.kps_mask) <= 10
        for kps, box, size in ((s.src_kps, s.src_box, s.src_size), (s.trg_kps, s.trg_box, s.trg_size)):
            original = kps * size / torch.tensor([64.0, 48.0])
            assert (original >= box[:2] - 1e-3).all() and (original <= box[2:] + 1e-3).all()
            assert (box[:2] >= 0).all() and (box[2:] <= size).all() and (box[2:] > box[:2]).all()
        flags = dataset.record(i).flags
        assert s.difficulty.tolist() == [flags[k] for k in ("viewpoint", "scale", "truncation", "occlusion")]
    batch = SyntheticPairs.collate(samples)
    assert batch.src_kps.shape == (40, 10, 2) and batch.kps_mask.any(1).all()


def test_rates(views: list[tuple[str, View]]) -> None:
    sided = [v for category, v in views if category != "bottle"]
    assert 0.22 < np.mean([v.mirrored for v in sided]) < 0.38
    assert not any(v.mirrored for category, v in views if category == "bottle")
    assert 0.18 < np.mean([v.occluder is not None for _, v in views]) < 0.38  # views that hide too much are redrawn
    assert 0.05 < np.mean([v.truncated for _, v in views]) < 0.2
    flags = [difficulty(a, b) for (_, a), (_, b) in zip(views, views[4:], strict=False)]
    for name, values in (("viewpoint", 3), ("scale", 3), ("truncation", 4), ("occlusion", 4)):
        assert {f[name] for f in flags} == set(range(values))


def test_points_are_hidden_exactly_by_the_border_and_the_occluder(views: list[tuple[str, View]]) -> None:
    hidden = 0
    for _, v in views:
        for point, shown in zip(v.kps, v.visible, strict=True):
            out = not (0 <= point[0] <= v.size[0] and 0 <= point[1] <= v.size[1])
            covered = v.occluder is not None and inside(point, v.occluder[0])
            assert shown == (not out and not covered)
            hidden += not shown
        assert v.visible.sum() >= 7
    assert hidden > 50


def to_edge(point: np.ndarray, corners: np.ndarray) -> float:
    """Distance of a point from the outline of a polygon."""
    edge = np.roll(corners, -1, axis=0) - corners
    along = ((point - corners) * edge).sum(1) / np.maximum((edge**2).sum(1), 1e-12)
    return float(np.linalg.norm(corners + np.clip(along, 0, 1)[:, None] * edge - point, axis=1).min())


def test_points_are_on_the_object(views: list[tuple[str, View]]) -> None:
    for _, v in views:
        for point in v.kps:
            assert any(to_edge(point, shape) < 0.02 * max(v.size) or inside(point, shape) for shape, _ in v.shapes)


def test_the_order_of_keypoints(views: list[tuple[str, View]]) -> None:
    """Turns of up to 20 degrees keep left left, and a mirrored car has its headlight on the left."""
    for category, v in views:
        x, y = v.kps.T
        facing = -1 if v.mirrored else 1
        if category == "bottle":
            assert (x[0::2] < x[1::2]).all() and y[0] < y[8]
        elif category == "car":
            assert ((x[[1, 2, 4, 8]] - x[[0, 3, 6, 9]]) * facing > 0).all()
        elif category == "horse":
            assert (x[0] - x[3]) * facing > 0 and y[5:9].min() > y[2]
        else:
            assert (x[0] - x[7]) * facing > 0 and y[1] < y[8:].min()


def test_repeated_parts_look_the_same() -> None:
    """Wheels are copies of each other, and so are hooves; a bottle but for its gleam is its own mirror image."""
    shapes, kps = OBJECTS["car"](rng(3))
    for first, second in [shapes[i : i + 2] for i in (8, 10, 12)]:
        assert first[1] == second[1]
        np.testing.assert_allclose(first[0] - kps[0], second[0] - kps[1], atol=1e-12)
    shapes, kps = OBJECTS["horse"](rng(3))
    rings = [shape for shape, _ in shapes if len(shape) == 20]
    hooves = [ring - kps[k] for k in range(5, 9) for ring in rings if np.allclose(ring.mean(0), kps[k])]
    assert len(hooves) == 4
    np.testing.assert_allclose(hooves, [hooves[0]] * 4, atol=1e-12)
    shapes, kps = OBJECTS["bottle"](rng(3))
    for k, (shape, _) in enumerate(shapes):
        mirrored = {(round(-x, 6) + 0.0, round(y, 6)) for x, y in shape}
        assert (mirrored == {(round(x, 6) + 0.0, round(y, 6)) for x, y in shape}) == (k != 1)
    np.testing.assert_allclose(np.array(kps)[0::2] * (-1, 1), np.array(kps)[1::2])


def test_instances_differ() -> None:
    """Proportions and colours vary: two objects do not map onto each other by any similarity."""

    def normal(points: list) -> np.ndarray:
        centred = np.array(points, dtype=float) - np.mean(points, axis=0)
        return centred / np.linalg.norm(centred)

    for draw in OBJECTS.values():
        drawn = [draw(rng(k)) for k in range(10)]
        assert len({shapes[0][1] for shapes, _ in drawn}) == 10
        # Procrustes: 1 for the same shape; 0.999 leaves a 22nd part of the object's size unexplained.
        alike = [np.linalg.svd(normal(drawn[0][1]).T @ normal(kps))[1].sum() for _, kps in drawn[1:]]
        assert np.mean(alike) < 0.999


def test_difficulty_is_coded_as_in_spair() -> None:
    plain = view("car", 64, rng(0))._replace(
        size=(100, 100), box=np.array([0.0, 0, 50, 20]), mirrored=False, yaw=0.0, truncated=False, occluder=None
    )
    cut, hidden = plain._replace(truncated=True), plain._replace(occluder=(np.zeros((4, 2)), (0, 0, 0)))
    assert difficulty(plain, plain) == {"viewpoint": 0, "scale": 0, "truncation": 0, "occlusion": 0}
    assert [difficulty(a, b)["truncation"] for a, b in ((cut, plain), (plain, cut), (cut, cut))] == [1, 2, 3]
    assert [difficulty(a, b)["occlusion"] for a, b in ((hidden, plain), (plain, hidden), (hidden, hidden))] == [1, 2, 3]
    assert [difficulty(plain, plain._replace(yaw=y))["viewpoint"] for y in (-19.0, 21.0, -51.0)] == [0, 1, 2]
    assert difficulty(plain._replace(mirrored=True), plain)["viewpoint"] == 2
    sides = [plain._replace(box=np.array([0.0, 0, 50 / f, 20])) for f in (1.2, 1.4, 2.0)]
    assert [difficulty(plain, s)["scale"] for s in sides] == [difficulty(s, plain)["scale"] for s in sides] == [0, 1, 2]


def test_rendering_repeats() -> None:
    v = view("bird", 64, rng(4))
    assert render(v).tobytes() == render(v).tobytes()
    assert render(v).size == v.size
    assert render(v).tobytes() != render(v._replace(seed=v.seed + 1)).tobytes()


def test_options_and_errors() -> None:
    assert len(create_dataset("synthetic", "nowhere", "trn")) == LENGTHS["trn"]
    assert len(SyntheticPairs("", "val", length={"trn": 5, "val": 6})) == 6
    assert len(SyntheticPairs("", "test", length={"trn": 5})) == LENGTHS["test"]
    with pytest.raises(IndexError):
        SyntheticPairs("", "val", length=3)[3]
    with pytest.raises(ZooError, match="length 0"):
        SyntheticPairs("", "val", length=0)
    with pytest.raises(ZooError, match="no split 'valid'"):
        SyntheticPairs("", "val", length={"valid": 3})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_spair(tmp_path_factory.mktemp("root"), pairs_per_split=22, images_per_category=4, size=64)


PAIR_KEYS = (
    "pair_id filename src_imname trg_imname src_imsize trg_imsize src_bndbox trg_bndbox category src_pose trg_pose "
    "src_kps trg_kps kps_ids mirror viewpoint_variation scale_variation truncation occlusion"
)


def test_the_dataset_that_other_tests_train_on_is_as_spair71k(written: Path) -> None:
    assert written.name == "SPair-71k" and [p.name for p in written.parent.iterdir()] == ["SPair-71k"]
    of_split = {}
    for split in ("trn", "val", "test"):
        lines = (written / "Layout" / "large" / f"{split}.txt").read_text().splitlines()
        assert len(lines) == len(set(lines)) == 22
        assert {f"{line}.json" for line in lines} == {p.name for p in (written / "PairAnnotation" / split).iterdir()}
        small = (written / "Layout" / "small" / f"{split}.txt").read_text().splitlines()
        assert len(small) == 5 and set(small) < set(lines)
        of_split[split] = set()
        for number, line in enumerate(lines, start=1):
            pair = json.loads((written / "PairAnnotation" / split / f"{line}.json").read_text())
            assert sorted(pair) == sorted(PAIR_KEYS.split())
            stems = [pair[f"{side}_imname"].removesuffix(".jpg") for side in ("src", "trg")]
            assert line == pair["filename"] == f"{number:06d}-{stems[0]}-{stems[1]}:{pair['category']}"
            of_split[split] |= set(stems)
    assert not of_split["trn"] & of_split["test"] and not of_split["trn"] & of_split["val"]


@pytest.mark.parametrize("split", ["trn", "val", "test"])
def test_the_spair_reader_reads_it(written: Path, split: str) -> None:
    dataset = SPair71k(written.parent, split, 64)
    assert len(dataset) == 22
    assert {dataset.record(i).category for i in range(22)} == set(OBJECTS)
    sample, record = dataset[0], dataset.record(0)
    assert sample.src_img.shape == (3, 64, 64) and len(record.src_kps) >= 4
    assert set(record.flags) == {"viewpoint", "scale", "truncation", "occlusion"}
    assert len(SPair71k(written.parent, split, 64, layout="small")) == 5
