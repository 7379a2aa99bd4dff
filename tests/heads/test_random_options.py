"""Every head under random options, levels and sizes, with fixed seeds: what holds whatever is combined.

A head's switches and choices are read from its signature, and its numbers from `NUMBERS`, so that a new head is tested
without a change here.
"""

import copy
import inspect
import random
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import torch.nn.functional as F

import corrzoo
from corrzoo.geometry import Size
from corrzoo.heads import HEADS
from corrzoo.matcher import Matcher
from corrzoo.types import Pair, ZooError

CASES = 8
VIT, CNN = "timm/test_vit.r160_in1k", "timm/test_resnet.r160_in1k"
LEVELS = {
    VIT: [[-1], [-2], [2, 5], [1, 3, 5], ["blocks.3"], ["blocks.1", -1]],
    CNN: [[-1], [2], [1, 2], [1, 2, 3], ["layer2.0:pre"], ["layer2.0", "layer3.0:pre"]],
}
NUMBERS: dict[str, list[Any]] = {
    "attention_heads": [2, 4],
    "c_m": [1.0, 5.0],
    "c_p": [1.0, 5.0],
    "channels": [[2, 1]],
    "consensus": [0.0, 0.7],
    "depth": [1, 2],
    "epe_weight": [0.0, 1.0],
    "flows": [["11"], ["22", "12"], ["11", "12", "21", "22"]],
    "grid": [4, 6, 8],
    "head_resolution": [0.125, 0.25],
    "kernel_sizes": [[3, 3], [1, 5]],
    "layers": [1, 2],
    "margin": [0.99, 1.0],  # where both the source and its mirror image are chosen
    "radius": [1, 3],
    "readout_radius": [None, 1],
    "relocalization": [1, 2],
    "rho": [0.5, 0.9],
    "rounds": [1, 2],
    "row_weight": [0.0, 1.0],
    "sigma": [None, 0.8],
    "stage1": [0.0, 0.25],
    "strength": [0.3, 1.0],
    "stride": [7, 8, 16, 200],  # with 200, the grid is one cell
    "temperature": [0.02, 0.3],
    "top_k": [0, 5, 64],
    "width": [128],
    "window": [1, 2],
    "windows": [[4], [2, 4]],
}
RECTANGLES = {"GSF": [[4, 8]], "GeoAware": [[4, 8], [7, 5]]}
"""Grids of the heads that take [h, w]."""
REFINING = ("ACTR", "GSF", "LPMFlow", "ViTSC")
"""Heads that add a network's output to the flow, which random weights may move out of the image."""


@dataclass
class Case:
    """A model with random options, a batch for it, and a text that says what was chosen."""

    head: str
    model: Matcher
    options: dict[str, Any]
    pair: Pair
    text: str


def choices(head: str) -> dict[str, list[Any]]:
    """The values to choose from for each option of a head and of its bases below `Matcher`."""
    found: dict[str, list[Any]] = {}
    for cls in HEADS[head].__mro__[: HEADS[head].__mro__.index(Matcher)]:
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.annotation is bool:
                found[name] = [True, False]
            elif get_origin(parameter.annotation) is Literal:
                found[name] = list(get_args(parameter.annotation))
            elif name in NUMBERS:
                found[name] = NUMBERS[name] + (RECTANGLES.get(head, []) if name == "grid" else [])
    return found


def pick(name: str, values: list[Any], number: int) -> Any:
    """Value `number` of a random sequence in which every block of len(values) has each value once."""
    block, place = divmod(number, len(values))
    return random.Random(f"{name} {block}").sample(values, len(values))[place]


def random_case(head: str, number: int) -> Case:
    """A configuration that the head accepts. One that it refuses by an error of one line is replaced by another."""
    refusals = []
    for turn in range(number, number + 20 * CASES, CASES):
        backbone = pick(f"{head} backbone", [VIT, CNN], turn)
        options = {
            "backbone": backbone,
            "levels": pick(f"{head} levels", LEVELS[backbone], turn),
            "finetune": pick(f"{head} finetune", ["all", "all", "none"], turn),
        }
        rng = random.Random(f"{head} {turn}")
        size = rng.randrange(33, 90), rng.randrange(33, 90)
        if backbone == VIT:
            options["backbone_size"] = rng.choice([None, True, 64])
            size = size if options["backbone_size"] else (16 * rng.randrange(2, 6), 16 * rng.randrange(2, 6))
        options |= {name: pick(f"{head} {name}", values, turn) for name, values in choices(head).items()}
        count, points = rng.choice([1, 2, 3]), rng.choice([1, 4, 9])
        text = f"{options}, {count} pairs of {size} pixels, {points} points"
        pair = random_pair(size, count, points, seed=number)
        torch.manual_seed(number)
        try:
            model = corrzoo.create_matcher(head, weights="random", **options).eval()
            model(pair.src_img, pair.trg_img)  # sizes are checked here
        except ZooError as error:
            refusals.append(f"{error}: {text}")
            assert "\n" not in str(error), refusals
        else:
            return Case(head, model, options, pair, text)
    raise AssertionError("\n".join(refusals))


def random_pair(size: Size, count: int, points: int, seed: int) -> Pair:
    """Random images (H, W) with random keypoints: the first at the image's last corner, some of the others padding."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def image() -> torch.Tensor:
        smooth = F.interpolate(uniform(count, 3, 5, 5), size, mode="bilinear")
        return ((0.9 * smooth + 0.1 * uniform(count, 3, *size)) * 255).to(torch.uint8)

    mask = uniform(count, points) < 0.8
    mask[:, 0] = True

    def keypoints() -> torch.Tensor:
        places = uniform(count, points, 2) * extent
        places[:, 0] = extent
        return places * mask.unsqueeze(2)

    ids = torch.where(mask, torch.arange(points), -1)
    box = torch.cat([torch.zeros(2), extent]).expand(count, 4)
    return Pair(
        src_img=image(),
        trg_img=image(),
        src_kps=keypoints(),
        trg_kps=keypoints(),
        kps_mask=mask,
        src_size=extent.expand(count, 2),
        trg_size=extent.expand(count, 2),
        src_box=box,
        trg_box=box,
        index=torch.arange(count),
        src_id=torch.full((count,), -1),
        trg_id=torch.full((count,), -1),
        category=torch.zeros(count, dtype=torch.int64),
        difficulty=torch.full((count, 4), -1),
        src_mask=(uniform(count, 6, 7) < 0.8).float(),
        trg_mask=(uniform(count, 6, 7) < 0.8).float(),
        kps_ids=ids,
        mirror_ids=torch.where(mask, ids ^ 1, -1),  # neighbours are left and right of each other
    )


@pytest.fixture(
    scope="module", params=[(head, n) for head in HEADS.names() for n in range(CASES)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def case(request):
    return random_case(*request.param)


def test_the_loss_and_its_gradients_are_finite(case):
    model = copy.deepcopy(case.model).train()
    torch.manual_seed(0)  # dropout and noise
    found = model.loss(model.match(*model.features(case.pair)), case.pair)
    for name, term in found.items() if isinstance(found, dict) else [("loss", found)]:
        assert term.ndim == 0 and torch.isfinite(term), f"{name}: {case.text}"
    loss = found["loss"] if isinstance(found, dict) else found
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    constant = case.head == "Baseline" and case.options.get("readout") in ("argmax", "identity")
    assert loss.requires_grad == bool(trained and not constant), case.text
    if loss.requires_grad:
        loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained.values()), case.text


@torch.no_grad()
def test_flow_and_matches_have_their_shapes_and_stay_near_the_image(case):
    src, trg = case.model.features(case.pair)
    flow = case.model.match(src, trg).flow
    assert flow.ndim == 4 and flow.shape[:2] == (len(case.pair.index), 2) and torch.isfinite(flow).all(), case.text
    points = case.pair.src_kps
    found = case.model.match_points(src, trg, points)
    assert found.shape == points.shape and found.dtype == points.dtype, case.text
    size = torch.tensor(case.pair.trg_img.shape[:1:-1])  # (W, H)
    # A soft-argmax stays inside the image, and a point at its border is read half a cell further.
    reach = (1.0 if case.head in REFINING else 0.5) * size
    assert ((found >= -reach) & (found <= size + reach)).all(), f"{found}: {case.text}"


@torch.no_grad()
def test_a_model_with_the_same_options_and_state_dict_gives_the_same_flow(case):
    torch.manual_seed(99)  # other weights
    other = HEADS[case.head](**case.model.hparams).eval()
    other.load_state_dict(case.model.state_dict())
    images = case.pair.src_img, case.pair.trg_img
    assert torch.equal(other(*images).flow, case.model(*images).flow), case.text


@torch.no_grad()
def test_a_batch_gives_what_its_pairs_give(case):
    model = copy.deepcopy(case.model).double()  # in float32, near-ties may be resolved differently
    images = [model.backbone.normalise(image) for image in (case.pair.src_img, case.pair.trg_img)]
    points = case.pair.src_kps.double()
    src, trg = model.features_of(*images)
    match, found = model.match(src, trg), model.match_points(src, trg, points)
    for i in range(len(points)):
        src, trg = model.features_of(*(image[i : i + 1] for image in images))
        close = {"atol": 1e-6, "rtol": 0, "msg": lambda difference: f"{difference}\n{case.text}"}
        alone = model.match(src, trg)
        if case.head == "TransforMatcher":
            torch.testing.assert_close(alone.correlation, match.correlation[i : i + 1], **close)
            best = alone.correlation.topk(2).values
            if (best[..., 0] - best[..., 1]).min() < 1e-9:
                continue  # equal scores, of cosines below zero, which its ReLU sets to zero: rounding decides
        torch.testing.assert_close(alone.flow, match.flow[i : i + 1], **close)
        torch.testing.assert_close(model.match_points(src, trg, points[i : i + 1]), found[i : i + 1], **close)
