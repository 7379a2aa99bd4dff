"""PCK against an evaluator in plain Python, published numbers, and invariances."""

import copy
import csv
import math
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchmetrics import MetricCollection

from corrzoo.scoring.pck import PCK, correct, correct_points, score
from corrzoo.scoring.protocols import get_protocol, list_protocols
from corrzoo.types import DIFFICULTIES, Pair, Record, ZooError

ALPHAS = (0.01, 0.05, 0.1, 0.15, 0.5)
M = TypeVar("M", PCK, MetricCollection)


def make_record(rng: random.Random, n: int, boxes: bool, whole: bool, category: int = 0) -> Record:
    """A random annotation; `whole` numbers as in SPair-71k, fractions as in PF-PASCAL."""

    def number(low: float, high: float) -> float:
        return float(rng.randint(math.ceil(low), math.floor(high))) if whole else rng.uniform(low, high)

    def side() -> tuple[tuple[int, int], torch.Tensor, torch.Tensor | None]:
        w, h = rng.randint(120, 500), rng.randint(120, 500)
        kps = torch.tensor([[number(0, w - 1), number(0, h - 1)] for _ in range(n)], dtype=torch.float64)
        x1, y1 = number(1, w / 2), number(1, h / 2)
        box = torch.tensor([x1, y1, number(x1 + 10, w), number(y1 + 10, h)], dtype=torch.float64)
        return (w, h), kps.reshape(n, 2), box if boxes else None

    (src_size, src_kps, src_box), (trg_size, trg_kps, trg_box) = side(), side()
    flags = {"viewpoint": rng.randint(-1, 2), "scale": rng.randint(0, 2)}
    flags |= {"truncation": rng.randint(0, 3), "occlusion": -1}
    return Record(
        None, None, src_kps, trg_kps, src_size, trg_size, f"c{category}", src_box, trg_box, flags if boxes else {}
    )


def make_pred(rng: random.Random, record: Record, evaluated: str) -> torch.Tensor:
    """Predictions at various distances from the ground truth; the first is exact."""
    gt = record.trg_kps if evaluated == "trg" else record.src_kps
    spread = [0.0] + [rng.choice([2, 10, 40, 150]) for _ in gt[1:]]
    return gt + torch.tensor([[rng.gauss(0, s), rng.gauss(0, s)] for s in spread], dtype=torch.float64)


# ---- every protocol in plain Python: lists, and one small function per choice of a protocol

FRAMES = {  # preset -> (how, side)
    "default": ("original", None), "hpf": ("shrink", 300), "dhpf": ("stretch", 240), "cats": ("stretch", 256),
    "catspp": ("stretch", 512), "actr": ("stretch", 512), "lpmflow": ("stretch", 512), "tm": ("stretch", 240),
    "dift": ("original", None), "geoaware": ("pad", 840), "distilldift": ("pad", 840), "probe3d": ("unit", None),
    "lucaosti": ("stretch", 448), "visualai": ("align", 840), "proposalflow": ("original", None),
    "vitsc": ("original", None), "ncnet:img": ("stretch", 224), "weakalign:img": ("stretch", 224),
    "weakalign:bbox-kp": ("original", None), "sfnet:img": ("stretch", 320), "sfnet:bbox-kp": ("original", None),
    "gsf:img": ("stretch", 224), "gsf:bbox": ("original", None), "gsf:bbox-kp": ("original", None),
}  # fmt: skip
EVALUATES_SRC = {"cats", "catspp", "ncnet", "weakalign", "sfnet"}
STRICT = {"geoaware", "distilldift", "probe3d"}
# name -> whose box | whose keypoint box where there is no annotated box ("-" for the one that pads) | none
BOX = {
    "default": ("trg", None), "hpf": ("trg", "trg"), "dhpf": ("trg", "trg-"), "cats": ("src", "src-"),
    "catspp": ("src", "src-"), "actr": ("src", "src-"), "lpmflow": ("src", "trg-"), "tm": ("trg", "trg-"),
    "dift": ("trg", None), "geoaware": ("trg", None), "distilldift": ("trg", None), "probe3d": ("trg", None),
    "lucaosti": ("trg", None), "visualai": ("trg", "trg"), "vitsc": ("trg", "trg-"), "gsf": ("trg", "trg"),
}  # fmt: skip
KEYPOINT_BOX = {
    "default": "trg", "hpf": "trg", "catspp": "src", "actr": "src", "lpmflow": "trg", "visualai": "trg",
    "weakalign": "src", "sfnet": "src", "proposalflow": "trg", "vitsc": "trg", "gsf": "trg",
}  # fmt: skip
PADDED_BOX = {
    "default": "trg", "dhpf": "trg", "cats": "src", "catspp": "src", "actr": "src", "lpmflow": "trg", "tm": "trg",
    "vitsc": "trg",
}  # fmt: skip
IMAGE = {*FRAMES, "ncnet", "weakalign", "sfnet", "gsf"} - {"dift", "lucaosti", "proposalflow"}
IMAGE = {name for name in IMAGE if ":" not in name}
EVERY = (
    {f"{n}:img" for n in IMAGE}
    | {f"{n}:bbox" for n in BOX}
    | {f"{n}:bbox-kp" for n in KEYPOINT_BOX}
    | {f"{n}:bbox-kp-padded" for n in PADDED_BOX}
)


def by_hand(pred: torch.Tensor, record: Record, protocol: str, alphas: tuple[float, ...]) -> list[float]:
    name, kind = protocol.split(":")
    how, S = FRAMES.get(name) or FRAMES[protocol]

    def factors(size: tuple[int, int]) -> tuple[float, float]:
        w, h = size
        if how == "original":
            return 1.0, 1.0
        if how == "shrink":
            return (S / max(w, h),) * 2 if max(w, h) > S else (1.0, 1.0)
        if how == "pad":
            return (S / max(w, h),) * 2
        if how == "unit":
            return (1 / max(w, h),) * 2
        if how == "align":
            return (S - 1) / (w - 1), (S - 1) / (h - 1)
        return S / w, S / h

    def annotated(side: str) -> list[tuple[float, float]]:
        fx, fy = factors(getattr(record, f"{side}_size"))
        out = []
        for x, y in getattr(record, f"{side}_kps").tolist():
            if how == "align":
                x, y = math.floor(x) * fx, math.floor(y) * fy
                out.append((min(max(x, 1e-4), S - 1 - 1e-4), min(max(y, 1e-4), S - 1 - 1e-4)))
            else:
                out.append((x * fx, y * fy))
        return out

    def keypoint_box(whose: str) -> float:
        real = annotated(whose.rstrip("-"))
        columns = list(real)
        if whose.endswith("-"):  # the array has 40 columns, and what is not a keypoint holds -1 (TransforMatcher: -2)
            columns += [(-2.0, -2.0) if name == "tm" else (-1.0, -1.0)] * (40 - len(real))
        return max(max(p[axis] for p in columns) - min(p[axis] for p in columns) for axis in (0, 1))

    def image() -> float:
        w, h = record.src_size if name in EVALUATES_SRC else record.trg_size
        return {"original": max(w, h), "shrink": min(max(w, h), 300), "unit": 1.0}.get(how, S)

    def box() -> float:
        whose, otherwise = BOX[name]
        annotated_box = getattr(record, f"{whose}_box")
        if annotated_box is None:
            return keypoint_box(otherwise)
        x1, y1, x2, y2 = annotated_box.tolist()
        fx, fy = factors(getattr(record, f"{whose}_size"))
        return max((x2 - x1) * fx, (y2 - y1) * fy)

    lengths = {"img": image, "bbox": box, "bbox-kp": lambda: keypoint_box(KEYPOINT_BOX[name])}
    L = lengths.get(kind, lambda: keypoint_box(PADDED_BOX[name] + "-"))()
    evaluated = "src" if name in EVALUATES_SRC else "trg"
    fx, fy = factors(getattr(record, f"{evaluated}_size"))
    fractions = []
    for alpha in alphas:
        right = 0
        for (px, py), (gx, gy) in zip(pred.tolist(), annotated(evaluated), strict=True):
            error = math.sqrt((px * fx - gx) ** 2 + (py * fy - gy) ** 2)
            right += error < alpha * L if name in STRICT else error <= alpha * L
        fractions.append(right / len(pred))
    return fractions


def test_presets_equal_the_protocol_matrix() -> None:
    assert set(list_protocols()) == EVERY


@pytest.mark.parametrize("protocol", sorted(EVERY))
def test_every_protocol_equals_a_plain_python_evaluator(protocol: str) -> None:
    rng = random.Random(protocol)
    for trial in range(40):
        n, boxes, whole = [1, 4, 10, 30][trial % 4], trial % 8 < 4, trial % 16 < 8
        record = make_record(rng, n, boxes, whole)
        pred = make_pred(rng, record, get_protocol(protocol).evaluated)
        name, kind = protocol.split(":")
        if kind == "bbox" and not boxes and BOX[name][1] is None:
            with pytest.raises(ZooError, match=r"needs annotated boxes .* use '[a-z0-9]*:bbox-kp'"):
                score(pred, record, protocol)
        else:
            got = score(pred, record, protocol, ALPHAS)
            assert got.dtype == torch.float64 and got.tolist() == by_hand(pred, record, protocol, ALPHAS)


def example(**changes: object) -> Record:
    """src 200 x 100, trg 400 x 200, two points."""
    src, trg = torch.tensor([[20.0, 30.0], [120.0, 80.0]]), torch.tensor([[40.0, 60.0], [140.0, 110.0]])
    record = Record(
        None, None, src.double(), trg.double(), (200, 100), (400, 200), "car",
        torch.tensor([10.0, 10.0, 130.0, 90.0]).double(), torch.tensor([30.0, 50.0, 230.0, 150.0]).double(),
    )  # fmt: skip
    return replace(record, **changes)


def test_thresholds_equal_hand_computed_values() -> None:
    """Errors of 10 px in original x. Bisection finds the alpha at which they become correct."""
    boxed, boxless = example(), example(src_box=None, trg_box=None)

    def critical(record: Record, protocol: str) -> float:
        """Smallest alpha at which a prediction that is 10 px off in x is correct: 10 px / L."""
        kps = record.src_kps if get_protocol(protocol).evaluated == "src" else record.trg_kps
        low, high = 0.0, 1.0
        while high - low > 1e-12:
            middle = (low + high) / 2
            right = score(kps + torch.tensor([10.0, 0.0]), record, protocol, (middle,)).item() == 1
            low, high = (low, middle) if right else (middle, high)
        return high

    # default: original pixels of trg; box 200 x 100, image 400, keypoints 100 x 50, padded 141
    assert critical(boxed, "default:bbox") == pytest.approx(10 / 200)
    assert critical(boxed, "default:img") == pytest.approx(10 / 400)
    assert critical(boxed, "default:bbox-kp") == pytest.approx(10 / 100)
    assert critical(boxed, "default:bbox-kp-padded") == pytest.approx(10 / 141)
    # actr, 512 square: 10 px of trg are 12.8; src box 120/200*512 by 80/100*512; padded src points 307.2 by 409.6
    assert critical(boxed, "actr:bbox") == pytest.approx(12.8 / 409.6)
    assert critical(boxless, "actr:bbox") == pytest.approx(12.8 / 410.6)
    assert critical(boxless, "actr:bbox-kp") == pytest.approx(12.8 / 256)
    # lpmflow: the same box; without one the padded trg points, 179.2 by 281.6
    assert critical(boxed, "lpmflow:bbox") == pytest.approx(12.8 / 409.6)
    assert critical(boxless, "lpmflow:bbox") == pytest.approx(12.8 / 282.6)
    assert critical(boxless, "lpmflow:bbox-kp") == pytest.approx(12.8 / 128)
    # cats, 256 square, src evaluated: 10 px of src are 12.8; src box 153.6 by 204.8
    assert critical(boxed, "cats:bbox") == pytest.approx(12.8 / 204.8)
    # hpf: trg shrinks by 300/400, which cancels; tm pads with -2 in its 240 square: trg points up to 84, 132
    assert critical(boxed, "hpf:bbox") == pytest.approx(10 / 200)
    assert critical(boxless, "hpf:bbox") == pytest.approx(10 / 100)
    assert critical(boxless, "tm:bbox") == pytest.approx(6 / 134)
    # geoaware and probe3d keep the aspect
    assert critical(boxed, "geoaware:bbox") == pytest.approx(10 / 200)
    assert critical(boxed, "probe3d:bbox") == pytest.approx(10 / 200)
    assert critical(boxed, "geoaware:img") == pytest.approx(10 / 400)
    # visualai: 839/399 on x, 839/199 on y, so the box is 421.6 high, not 420.6 wide
    assert critical(boxed, "visualai:bbox") == pytest.approx((10 * 839 / 399) / (100 * 839 / 199))


def test_compare_decides_ties() -> None:
    pred = example().trg_kps + torch.tensor([0.0, 20.0])  # 0.1 of the 200 px box
    assert score(pred, example(), "dift:bbox", (0.1,)).item() == 1
    assert score(pred, example(), "default:bbox", (0.1,)).item() == 1
    assert score(pred, example(), replace(get_protocol("default:bbox"), compare="<"), (0.1,)).item() == 0
    assert score(example().trg_kps, example(src_box=None, trg_box=None), "visualai:bbox", (0.0,)).item() == 1


def test_threshold_side_can_be_changed_alone() -> None:
    """The default protocol with the query's threshold: ACTR's choice, in original pixels."""
    query = replace(get_protocol("default:bbox"), threshold_side="query")
    pred = example().trg_kps + torch.tensor([15.0, 0.0])
    assert score(pred, example(), "default:bbox", (0.1,)).item() == 1  # 15 <= 20
    assert score(pred, example(), query, (0.1,)).item() == 0  # 15 > 12
    assert "query" not in get_protocol("default:bbox").flaw and "src image's" in query.flaw


def test_the_box_of_one_keypoint_accepts_exact_predictions_only() -> None:
    record = example(src_kps=torch.tensor([[5.0, 5.0]]).double(), trg_kps=torch.tensor([[7.0, 9.0]]).double())
    assert score([[7, 9]], record, "default:bbox-kp").tolist() == [1, 1, 1]
    assert score([[7, 9.001]], record, "default:bbox-kp").tolist() == [0, 0, 0]


def test_flaws_are_marked_and_default_has_none() -> None:
    flawed = {name for name in list_protocols() if get_protocol(name).flaw}
    assert flawed == {
        "default:bbox-kp-padded", "dhpf:bbox", "dhpf:bbox-kp-padded", "cats:bbox", "cats:bbox-kp-padded",
        "catspp:bbox", "catspp:bbox-kp-padded", "actr:bbox", "actr:bbox-kp", "actr:bbox-kp-padded", "lpmflow:bbox",
        "lpmflow:bbox-kp-padded", "tm:bbox", "tm:bbox-kp-padded", "vitsc:bbox", "vitsc:bbox-kp-padded",
    }  # fmt: skip
    for name in list_protocols():
        protocol = get_protocol(name)
        assert str(protocol) == name and protocol.meaning and protocol.source
    assert get_protocol("catspp:bbox-kp").meaning == "larger side of the src keypoint box; frame: stretch 512"


def test_unknown_protocols_are_one_line_errors() -> None:
    for name, message in {
        "actrr:bbox": "unknown protocol 'actrr': did you mean 'actr'\\?",
        "cats:bbox-kp": "'cats' has no threshold kind 'bbox-kp': choose one of 'cats:img', 'cats:bbox', 'cats:bbox-kp-",
        "dift": "'dift' has no threshold kind '': choose one of 'dift:bbox'",
    }.items():
        with pytest.raises(ZooError, match=message) as error:
            get_protocol(name)
        assert "\n" not in str(error.value)


def test_invalid_predictions_raise() -> None:
    record = example()
    with pytest.raises(ZooError, match=r"shape \(n, 2\), got \(2, 3\)"):
        score(torch.zeros(2, 3), record)
    with pytest.raises(ZooError, match=r"2 keypoints .* got 3"):
        score(torch.zeros(3, 2), record)
    with pytest.raises(ZooError, match=r"at \[0, 1\] is \[nan, 1.0\]"):
        score(torch.tensor([[0.0, 0.0], [torch.nan, 1.0]]), record)
    with pytest.raises(ZooError, match="0 keypoints"):
        score(torch.zeros(0, 2), example(src_kps=torch.zeros(0, 2), trg_kps=torch.zeros(0, 2)))


# ---- given numbers


@pytest.mark.parametrize("grid", [64, 128])
def test_pck_equals_the_released_evaluators(shared: Path, grid: int) -> None:
    """Against the evaluators of ACTR (grid 64) and LPMFlow (128) on stored predictions, in their 512 px frame."""
    data = np.load(shared / "golden" / "data.npz")
    est, gt, L = (torch.from_numpy(data[f"{k}_{grid}"]) for k in ("est_kps", "pck_trg_kps", "pck_thres"))
    mask = torch.arange(40) < torch.from_numpy(data["n_pts"]).unsqueeze(1)
    alphas = (0.01, 0.03, 0.05, 0.1, 0.15)
    right = correct(est.transpose(1, 2), gt.transpose(1, 2), L, alphas, mask, "<=")
    got = right.sum(1) / mask.sum(1, keepdim=True).double()
    want = np.stack([data[f"pck_{grid}_alpha{alpha}"] for alpha in alphas], axis=1)
    np.testing.assert_allclose(100 * got.numpy(), want, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def pfwillow(shared: Path) -> list[Record]:
    with (shared / "PF-WILLOW" / "test_pairs.csv").open() as file:
        lines = list(csv.reader(file))[1:]
    paths = {path: shared / "PF-WILLOW" / path.split("/", 1)[1] for line in lines for path in line[:2]}
    sizes = {path: Image.open(file).size for path, file in paths.items()}

    def points(columns: list[str]) -> torch.Tensor:
        return torch.tensor([float(c) for c in columns], dtype=torch.float64).reshape(2, 10).T

    return [
        Record(None, None, points(line[2:22]), points(line[22:42]), sizes[line[0]], sizes[line[1]], "")
        for line in lines
    ]


def test_identity_baseline_on_pfwillow(pfwillow: list[Record]) -> None:
    """PCK of the same relative position, as another evaluator gave it: 12.2 / 27.0 / 41.7."""
    scores = []
    for record in pfwillow:
        scale = torch.tensor(record.trg_size).double() / torch.tensor(record.src_size)
        scores.append(score(record.src_kps * scale, record, "default:bbox-kp"))
    assert len(scores) == 900
    assert (100 * torch.stack(scores).mean(0)).tolist() == pytest.approx([12.2, 27.0, 41.7], abs=0.05)


def test_padding_lengthens_pfwillows_thresholds(pfwillow: list[Record]) -> None:
    """431.8 instead of 350.2 px in a 512 px frame: 1.28 times on average, as `flaw` says, and 2.16 at most."""
    tight, padded = [], []
    for record in pfwillow:
        w, h = record.trg_size
        kps = record.trg_kps * torch.tensor([512 / w, 512 / h]).double()
        tight.append((kps.amax(0) - kps.amin(0)).max().item())
        padded.append(kps.max().item() + 1)
        for protocol, L in (("lpmflow:bbox", padded[-1]), ("lpmflow:bbox-kp", tight[-1])):
            off = record.trg_kps + torch.tensor([0.1 * L * w / 512, 0]).double()
            assert score(off, record, protocol, (0.0999, 0.1001)).tolist() == [0, 1]
    ratio = np.array(padded) / np.array(tight)
    assert np.mean(padded) == pytest.approx(431.8, abs=0.05) and np.mean(tight) == pytest.approx(350.2, abs=0.05)
    assert ratio.mean() == pytest.approx(1.28, abs=0.005) and ratio.max() == pytest.approx(2.16, abs=0.005)


# ---- properties

seeds = st.integers(0, 10**6)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(sorted(EVERY)), st.integers(1, 12))
def test_pck_increases_with_alpha(seed: int, protocol: str, n: int) -> None:
    rng = random.Random(seed)
    record = make_record(rng, n, boxes=True, whole=seed % 2 == 0)
    fractions = score(make_pred(rng, record, get_protocol(protocol).evaluated), record, protocol, ALPHAS)
    assert (fractions.diff() >= 0).all() and (fractions >= 0).all() and (fractions <= 1).all()


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["default:bbox", "default:bbox-kp", "dift:bbox", "weakalign:bbox-kp"]), st.integers(1, 9))
def test_pck_is_invariant_to_translation_and_scale(seed: int, protocol: str, n: int) -> None:
    """Shifts are integers and scales powers of two, so that float arithmetic is exact."""
    rng = random.Random(seed)
    record = make_record(rng, n, boxes=True, whole=True)
    pred = make_pred(rng, record, get_protocol(protocol).evaluated).round()
    shift, zoom = torch.tensor([rng.randint(0, 64), rng.randint(0, 64)]).double(), rng.choice([0.5, 2.0, 4.0])
    moved = replace(
        record,
        src_kps=(record.src_kps + shift) * zoom,
        trg_kps=(record.trg_kps + shift) * zoom,
        src_box=(record.src_box + shift.repeat(2)) * zoom,
        trg_box=(record.trg_box + shift.repeat(2)) * zoom,
    )
    assert torch.equal(score(pred, record, protocol, ALPHAS), score((pred + shift) * zoom, moved, protocol, ALPHAS))


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(["actr:img", "cats:bbox", "lucaosti:bbox", "catspp:bbox-kp"]))
def test_pck_in_a_square_frame_is_invariant_to_the_aspect_ratio(seed: int, protocol: str) -> None:
    """Stretching images and annotations by 2 along x does not change PCK."""
    rng = random.Random(seed)
    record, both = make_record(rng, 7, boxes=True, whole=False), torch.tensor([2.0, 1.0]).double()
    pred = make_pred(rng, record, get_protocol(protocol).evaluated)
    stretched = replace(
        record,
        src_kps=record.src_kps * both, trg_kps=record.trg_kps * both,
        src_box=record.src_box * both.repeat(2), trg_box=record.trg_box * both.repeat(2),
        src_size=(2 * record.src_size[0], record.src_size[1]), trg_size=(2 * record.trg_size[0], record.trg_size[1]),
    )  # fmt: skip
    assert torch.equal(score(pred, record, protocol, ALPHAS), score(pred * both, stretched, protocol, ALPHAS))


# ---- the metric


def collate(records: list[Record], indices: list[int], K: int = 12, network: tuple[int, int] = (96, 160)) -> Pair:
    """A batch of records at network size (H, W), as a dataset makes it: float32, K rows, NaN for missing boxes."""
    H, W = network
    B = len(records)
    kps, box, size = {}, {}, {}
    mask = torch.zeros(B, K, dtype=torch.bool)
    for side in ("src", "trg"):
        kps[side] = torch.zeros(B, K, 2)
        box[side] = torch.full((B, 4), torch.nan)
        size[side] = torch.tensor([getattr(r, f"{side}_size") for r in records], dtype=torch.float32)
        for b, record in enumerate(records):
            points, (w, h) = getattr(record, f"{side}_kps"), getattr(record, f"{side}_size")
            kps[side][b, : len(points)] = (points * torch.tensor([W / w, H / h])).float()
            mask[b, : len(points)] = True
            if getattr(record, f"{side}_box") is not None:
                box[side][b] = getattr(record, f"{side}_box").float()
    image = torch.zeros(B, 3, H, W)
    none = torch.full((B,), -1)
    return Pair(
        image, image, kps["src"], kps["trg"], mask, size["src"], size["trg"], box["src"], box["trg"],
        torch.tensor(indices), none, none, torch.tensor([int(r.category[1:]) for r in records]),
        torch.tensor([[r.flags.get(name, -1) for name in DIFFICULTIES] for r in records]),
    )  # fmt: skip


def benchmark(count: int, protocol: str = "default:bbox", seed: int = 0) -> tuple[list[Record], list[torch.Tensor]]:
    rng = random.Random(seed)
    records = [make_record(rng, rng.randint(1, 12), True, True, rng.randrange(4)) for _ in range(count)]
    return records, [make_pred(rng, record, get_protocol(protocol).evaluated) for record in records]


def feed(metric: M, records: list[Record], preds: list[torch.Tensor], order: list[int], batch: int) -> M:
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        padded = torch.full((len(chosen), 12, 2), torch.nan, dtype=torch.float64)  # what the mask hides may be NaN
        for b, i in enumerate(chosen):
            padded[b, : len(preds[i])] = preds[i]
        metric.update(padded, collate([records[i] for i in chosen], chosen))
    return metric


@pytest.mark.parametrize("protocol", ["default:bbox", "cats:bbox", "actr:bbox", "probe3d:bbox", "visualai:bbox-kp"])
def test_averages_equal_plain_loops(protocol: str) -> None:
    records, preds = benchmark(23, protocol)
    got = feed(PCK(protocol), records, preds, list(range(23)), 4).compute()
    fractions = [score(pred, record, protocol) for pred, record in zip(preds, records, strict=True)]
    for a, alpha in enumerate(("0.05", "0.1", "0.15")):
        groups = defaultdict(list)
        for record, fraction in zip(records, fractions, strict=True):
            groups[record.category].append((fraction[a].item(), len(record.trg_kps)))

        def image(rows: list[tuple[float, int]]) -> float:
            return 100 * sum(f for f, _ in rows) / len(rows)

        def point(rows: list[tuple[float, int]]) -> float:
            return 100 * sum(f * n for f, n in rows) / sum(n for _, n in rows)

        everything = [row for rows in groups.values() for row in rows]
        want = {
            "image": image(everything),
            "point": point(everything),
            "category": sum(map(image, groups.values())) / len(groups),
            "category-point": sum(map(point, groups.values())) / len(groups),
        }
        assert {name: got[f"pck@{alpha}/{name}"].item() for name in want} == pytest.approx(want, abs=1e-10)
        assert got[f"pck@{alpha}"] == got[f"pck@{alpha}/{get_protocol(protocol).averages[0]}"]
        assert all(value.ndim == 0 and value.dtype == torch.float64 for value in got.values())


def test_rows_and_breakdown_equal_plain_loops() -> None:
    records, preds = benchmark(17)
    metric = feed(PCK(alphas=(0.1,), categories=("ant", "bee", "cow", "dog")), records, preds, list(range(17)), 5)
    rows = metric.rows()
    assert [row["index"] for row in rows] == list(range(17))
    for row, record, pred in zip(rows, records, preds, strict=True):
        assert row["points"] == len(record.trg_kps)
        assert row["category"] == ("ant", "bee", "cow", "dog")[int(record.category[1:])]
        assert {name: row[name] for name in DIFFICULTIES} == record.flags
        assert row["pck@0.1"] == pytest.approx(100 * score(pred, record, alphas=(0.1,)).item(), abs=1e-10)
    groups = metric.breakdown()
    assert groups["occlusion"] == {}  # never annotated
    assert set(groups["truncation"]) == {"0", "1", "2", "3", ">0"}
    for name in ("category", *DIFFICULTIES):
        for group, got in groups[name].items():
            members = [r for r in rows if str(r[name]) == group or (group == ">0" and r[name] > 0)]
            right = sum(r["pck@0.1"] * r["points"] for r in members)
            assert got["pairs"] == len(members) and got["points"] == sum(r["points"] for r in members)
            assert got["pck@0.1/image"] == pytest.approx(np.mean([r["pck@0.1"] for r in members]), abs=1e-10)
            assert got["pck@0.1/point"] == pytest.approx(right / got["points"], abs=1e-10)
    counted = sum(groups["viewpoint"][g]["pairs"] for g in groups["viewpoint"] if g != ">0")
    assert counted == sum(r.flags["viewpoint"] >= 0 for r in records) < 17


@pytest.mark.parametrize(("protocol", "evaluated"), [("default:bbox", "trg"), ("cats:bbox", "src")])
def test_geometry_aware_scores_equal_plain_loops(protocol: str, evaluated: str) -> None:
    """Also for batches of different widths, without the flags, and where a pair has none or only such keypoints."""
    records, preds = benchmark(14, protocol)
    rng = random.Random(4)
    alike = {
        i: {side: [rng.random() < i % 3 / 2 for _ in r.trg_kps] for side in ("src", "trg")}
        for i, r in enumerate(records)
    }
    metric = PCK(protocol, (0.05, 0.1))
    for i, (record, pred) in enumerate(zip(records, preds, strict=True)):
        n, K = len(pred), len(pred) + i % 2  # the padding is not counted
        flags = {f"{side}_alike": torch.tensor([found + [True] * (K - n)]) for side, found in alike[i].items()}
        pair = collate([record], [i], K)._replace(**(flags if i % 3 else {}))  # unknown without
        metric.update(torch.cat([pred, torch.zeros(K - n, 2)])[None], pair)
    groups = metric.breakdown()["geometry"]
    for name in ("aware", "other"):
        for alpha in (0.05, 0.1):
            fractions, right, points = [], 0, 0
            for i, (record, pred) in enumerate(zip(records, preds, strict=True)):
                hits = by_point(pred, record, protocol, alpha)
                chosen = [hit for hit, yes in zip(hits, alike[i][evaluated], strict=True) if yes == (name == "aware")]
                fractions += [sum(chosen) / len(chosen)] if chosen else []
                right, points = right + sum(chosen), points + len(chosen)
            assert groups[name]["pairs"] == len(fractions) < 14 and groups[name]["points"] == points > 0
            assert groups[name][f"pck@{alpha}/image"] == pytest.approx(100 * sum(fractions) / len(fractions), abs=1e-10)
            assert groups[name][f"pck@{alpha}/point"] == pytest.approx(100 * right / points, abs=1e-10)
    plain = feed(PCK(protocol, (0.05, 0.1)), records, preds, list(range(14)), 5)
    assert plain.compute() == metric.compute() and "geometry" not in plain.breakdown()


def by_point(pred: torch.Tensor, record: Record, protocol: str, alpha: float) -> list[bool]:
    """Which keypoints are correct, each as a record of one keypoint; boxes are annotated."""
    points = zip(pred, record.src_kps, record.trg_kps, strict=True)
    ones = ((p[None], replace(record, src_kps=s[None], trg_kps=t[None])) for p, s, t in points)
    return [by_hand(p, one, protocol, (alpha,)) == [1.0] for p, one in ones]


def test_scores_do_not_depend_on_order_batches_or_repeats() -> None:
    records, preds = benchmark(31)
    one = feed(PCK(), records, preds, list(range(31)), 31)
    order = random.Random(1).sample(range(31), 31)
    other = feed(PCK(), records, preds, [*order, *order[:5]], 3)
    assert one.compute() == other.compute()  # bit for bit
    assert one.rows() == other.rows() and one.breakdown() == other.breakdown()


def test_float32_network_pixels_keep_integer_annotations_exact() -> None:
    """Ties and boxes of one keypoint are scored as by `score`, at any network size."""
    rng = random.Random(3)
    for _ in range(20):
        record = make_record(rng, rng.choice([1, 5]), True, True)
        offsets = torch.tensor([[rng.choice([0, 3, 6]), rng.choice([0, 4, 8])] for _ in record.trg_kps]).double()
        record = replace(record, trg_box=torch.tensor([0.0, 0.0, 50.0, 100.0]).double())
        for protocol in ("default:bbox", "geoaware:bbox", "default:bbox-kp", "visualai:bbox-kp"):
            metric = PCK(protocol, (0.05, 0.1))
            network = (rng.randint(90, 900), rng.randint(90, 900))
            metric.update((record.trg_kps + offsets)[None], collate([record], [0], len(offsets), network))
            want = score(record.trg_kps + offsets, record, protocol, (0.05, 0.1))
            assert [metric.rows()[0][f"pck@{a}"] for a in (0.05, 0.1)] == (100 * want).tolist()


def test_pairs_without_keypoints_do_not_count() -> None:
    records, preds = benchmark(5)
    empty = replace(records[0], src_kps=torch.zeros(0, 2), trg_kps=torch.zeros(0, 2))
    plain = feed(PCK(), records, preds, list(range(5)), 5)
    with_empty = feed(PCK(), [*records, empty], [*preds, torch.zeros(0, 2)], [5, 0, 1, 2, 3, 4], 3)
    assert plain.compute() == with_empty.compute() and plain.rows() == with_empty.rows()
    only = PCK()
    only.update(torch.zeros(1, 12, 2), collate([empty], [0]))
    only.update(torch.zeros(1, 0, 2), collate([empty], [0], K=0))
    only.update(torch.zeros(0, 2), empty)
    for ask in (only.compute, only.rows, only.breakdown):
        with pytest.raises(ZooError, match="PCK has no scored pairs"):
            ask()
    assert correct_points(torch.zeros(1, 0, 2), collate([empty], [0], K=0), "default:bbox-kp", 0.1).shape == (1, 0)
    with pytest.raises(ZooError, match="each of 0 keypoints"):
        only.update(torch.zeros(1, 2), empty)


def test_invalid_batches_raise() -> None:
    records, _ = benchmark(2)
    pair = collate(records, [0, 1])
    with pytest.raises(ZooError, match=r"expected predictions of shape \(2, 12, 2\), got \(2, 11, 2\)"):
        PCK().update(torch.zeros(2, 11, 2), pair)
    with pytest.raises(ZooError, match=r"prediction at \[1, 0\] is \[nan, nan\]"):
        PCK().update(torch.cat([torch.zeros(1, 12, 2), torch.full((1, 12, 2), torch.nan)]), pair)
    with pytest.raises(ZooError, match="has no name: PCK was given 1"):
        PCK(categories=["ant"]).update(torch.zeros(2, 12, 2), pair._replace(category=torch.tensor([0, 1])))
    with pytest.raises(ZooError, match="use 'default:bbox-kp'"):
        PCK().update(torch.zeros(2, 12, 2), pair._replace(trg_box=torch.full((2, 4), torch.nan)))
    with pytest.raises(ZooError, match="unknown protocol"):
        PCK("spair")


def test_invalid_records_raise() -> None:
    record = example()
    with pytest.raises(ZooError, match=r"shape \(n, 2\), got \(2, 3\)"):
        PCK().update(torch.zeros(2, 3), record)
    with pytest.raises(ZooError, match="category 1 has no name: PCK was given 1"):
        PCK(categories=["ant"]).update(record.trg_kps, record, category=1)


def test_a_batch_may_mix_pairs_with_and_without_boxes() -> None:
    rng = random.Random(5)
    records = [make_record(rng, 6, boxes, True) for boxes in (True, False, True)]
    preds = [make_pred(rng, record, "trg") for record in records]
    metric = feed(PCK("lpmflow:bbox"), records, preds, [0, 1, 2], 3)
    want = [score(pred, record, "lpmflow:bbox") for pred, record in zip(preds, records, strict=True)]
    assert [row["pck@0.1"] for row in metric.rows()] == [100 * w[1].item() for w in want]


def test_protocols_that_evaluate_the_source_equal_swapped_records() -> None:
    """`cats:img` of (pred, pair) equals a protocol that evaluates the target of swapped records."""
    records, preds = benchmark(6, "cats:img")
    swapped = [
        replace(r, src_kps=r.trg_kps, trg_kps=r.src_kps, src_size=r.trg_size, trg_size=r.src_size) for r in records
    ]
    mirrored = replace(get_protocol("cats:img"), evaluated="trg")
    one = feed(PCK("cats:img"), records, preds, list(range(6)), 2)
    other = feed(PCK(mirrored), swapped, preds, list(range(6)), 2)
    assert one.compute() == other.compute()


def test_correct_points_agree_with_the_metric() -> None:
    records, preds = benchmark(3)
    pred, pair = torch.zeros(3, 12, 2).double(), collate(records, [0, 1, 2])
    for b in range(3):
        pred[b, : len(preds[b])] = preds[b]
    right = correct_points(pred, pair, "default:bbox", 0.1)
    want = [round(score(p, r, alphas=(0.1,)).item() * len(p)) for p, r in zip(preds, records, strict=True)]
    assert right.sum(1).tolist() == want and not right[~pair.kps_mask].any()


def test_buffered_batches_of_any_width_and_size_score_as_one_batch() -> None:
    """700 batches of 16 pairs exceed the buffer; numbers of keypoint rows and network sizes differ."""
    records, preds = benchmark(29)
    one = feed(PCK(), records, preds, list(range(29)), 29)
    metric = PCK()
    for k in range(700):
        chosen = [(16 * k + j) % 29 for j in range(16)] if k else list(range(16))
        K = 12 + k % 3
        padded = torch.zeros(16, K, 2, dtype=torch.float64)
        for b, i in enumerate(chosen):
            padded[b, : len(preds[i])] = preds[i]
        metric.update(padded, collate([records[i] for i in chosen], chosen, K, (96, 160) if k % 100 else (64, 64)))
    assert metric.compute() == one.compute() and metric.rows() == one.rows()


def test_an_invalid_buffered_batch_raises_in_compute() -> None:
    records, preds = benchmark(4)
    metric = feed(PCK(), records, preds, [0, 1], 2)
    metric.update(torch.full((1, 12, 2), torch.inf), collate(records[:1], [3]))
    with pytest.raises(ZooError, match="expected a finite"):
        metric.compute()


def test_reset_deepcopy_and_dtypes() -> None:
    records, preds = benchmark(4)
    metric = feed(PCK(), records, preds, [0, 1, 2, 3], 4)
    other = copy.deepcopy(metric).to(torch.bfloat16)
    assert other.compute() == metric.compute()
    metric.reset()
    metric.update(torch.zeros(1, 12, 2, dtype=torch.bfloat16, requires_grad=True), collate(records[:1], [0]))
    assert [row["index"] for row in metric.rows()] == [0]


def test_torchmetrics_operations_keep_buffered_batches() -> None:
    """`forward`, which resets the state for a while, `merge_state` and `state_dict`."""
    records, preds = benchmark(8)
    one = feed(PCK(), records, preds, list(range(8)), 8)
    called = feed(PCK(), records, preds, list(range(6)), 2)
    padded = torch.zeros(2, 12, 2, dtype=torch.float64)
    for b, i in enumerate((6, 7)):
        padded[b, : len(preds[i])] = preds[i]
    batch = called(padded, collate(records[6:], [6, 7]))
    assert called.rows() == one.rows() and batch == feed(PCK(), records, preds, [6, 7], 2).compute()
    merged, other = feed(PCK(), records, preds, [0, 1, 2], 1), feed(PCK(), records, preds, [3, 4, 5, 6, 7], 2)
    merged.merge_state(other)
    assert merged.rows() == one.rows()
    saved = feed(PCK(), records, preds, list(range(8)), 2)
    saved.persistent(True)
    assert sum(map(len, saved.state_dict()["table"])) == 8


@pytest.mark.parametrize("changes", [{}, {"protocol": "default:img"}, {"alphas": (0.01, 0.02, 0.03)}])
def test_a_collection_scores_each_metric_as_alone(changes: dict[str, object]) -> None:
    """The first batch, exact predictions, scores alike. torchmetrics groups metrics whose states are equal after it."""
    records, preds = benchmark(8)
    preds[:2] = [record.trg_kps for record in records[:2]]
    both = MetricCollection({"one": PCK(), "other": PCK(**changes)})
    feed(both, records, preds, list(range(8)), 2)
    for name, alone in {"one": PCK(), "other": PCK(**changes)}.items():
        assert both[name].rows() == feed(alone, records, preds, list(range(8)), 2).rows()
