"""Augmentations: a dot drawn under a keypoint stays under it, boxes and sizes follow, and the generator decides all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corrzoo.data import augment as module
from corrzoo.data.augment import create_augment, crop, list_augments, recolour
from corrzoo.types import Pair, ZooError

RECIPES = sorted(set(list_augments()) - {"none"})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dots(points: Tensor, size: tuple[int, int]) -> Tensor:
    """A dark image with a bright dot at each of three points, each in its own channel."""
    H, W = size
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    reach = [((x - px) ** 2 + (y - py) ** 2) <= 2.5**2 for px, py in points.tolist()]
    return torch.stack(reach).to(torch.uint8) * 255


def sample(seed: int, size: tuple[int, int] = (48, 64), boxes: bool = True) -> Pair:
    """Two images of dots, in original sizes that differ from the network's on both axes."""
    rng = generator(seed)
    H, W = size
    sides = {}
    for side, original in (("src", (96.0, 60.0)), ("trg", (50.0, 75.0))):
        grid = torch.tensor([[0.35, 0.35], [0.6, 0.4], [0.5, 0.62]]) + 0.06 * torch.rand(3, 2, generator=rng)
        kps = (grid * torch.tensor([W, H])).floor() + 0.5
        scale = torch.tensor(original) / torch.tensor([W, H])
        box = torch.cat([(kps.amin(0) - 3) * scale, (kps.amax(0) + 3) * scale])
        sides[side] = (dots(kps, size), kps, torch.tensor(original), box if boxes else torch.full((4,), torch.nan))
    (si, sk, ss, sb), (ti, tk, ts, tb) = sides["src"], sides["trg"]
    one = torch.tensor(7)
    return Pair(si, ti, sk, tk, torch.ones(3, dtype=torch.bool), ss, ts, sb, tb, one, one, one, one, torch.zeros(4))


def centre(channel: Tensor) -> Tensor:
    """Where the dot of one channel is: its centroid."""
    H, W = channel.shape
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    return torch.stack([(channel * x).sum(), (channel * y).sum()]) / channel.sum()


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("name", ["flip", "crop", "crop around keypoints"])
@pytest.mark.parametrize("seed", range(8))
def test_dots_stay_under_their_keypoints(name: str, seed: int, boxes: bool) -> None:
    around = "keypoints" if "keypoints" in name else "objects"
    change = create_augment(name) if name == "flip" else lambda s, rng: crop(s, rng, p=1.0, around=around)
    before = sample(seed, boxes=boxes)
    after = change(before, generator(seed))
    for side in ("src", "trg"):
        image, kps = getattr(after, f"{side}_img"), getattr(after, f"{side}_kps")
        assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
        for k, point in enumerate(kps):
            x, y = point.long()
            assert image[k, y, x] > 150
            if boxes:  # without one, the crop may cut through the outermost dots
                torch.testing.assert_close(centre(image[k].float()), point, atol=0.3, rtol=0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", RECIPES)
def test_boxes_and_sizes_move_with_the_keypoints(name: str, seed: int) -> None:
    before = sample(seed)
    after = create_augment(name)(before, generator(seed))
    for side in ("src", "trg"):
        (kps, size, box), (old_kps, old_size, old_box) = (
            [getattr(s, f"{side}_{what}") for what in ("kps", "size", "box")] for s in (after, before)
        )
        to_original = size / torch.tensor([64.0, 48.0])
        was_original = old_size / torch.tensor([64.0, 48.0])
        # In original pixels nothing is stretched: the points, and the box around them, keep their distances.
        points, old_points = kps * to_original, old_kps * was_original
        torch.testing.assert_close((points - points[:1]).abs(), (old_points - old_points[:1]).abs(), atol=1e-3, rtol=0)
        torch.testing.assert_close(box[2:] - box[:2], old_box[2:] - old_box[:2], atol=1e-3, rtol=0)
        expected = torch.tensor([3.0, 3.0]) * was_original
        torch.testing.assert_close((kps * to_original).amin(0) - box[:2], expected, atol=1e-3, rtol=0)
        assert (box[:2] > -was_original).all() and (box[2:] < size + was_original).all()  # rounded down, as released


def test_crops_cover_what_the_papers_allow() -> None:
    """Edges reach both ends of [0, x1] and [x2, W], and the two images are cropped independently, p = 0.7 each."""
    before = sample(0)
    cropped = torch.zeros(2, 2)
    lefts, rights = [], []
    for seed in range(300):
        after = create_augment("cats")(before._replace(src_img=before.src_img, trg_img=before.trg_img), generator(seed))
        changed = [bool((getattr(after, f"{s}_size") != getattr(before, f"{s}_size")).any()) for s in ("src", "trg")]
        cropped[int(changed[0]), int(changed[1])] += 1
        if changed[0]:
            left = ((before.src_box - after.src_box)[0] * 64 / 96).round()
            lefts.append(int(left))
            rights.append(int(left + (after.src_size[0] * 64 / 96).round()))
    x1, x2 = int(before.src_box[0] * 64 / 96), int(before.src_box[2] * 64 / 96)
    assert (min(lefts), max(lefts), min(rights), max(rights)) == (0, x1, x2, 64)
    expected = 300 * torch.tensor([[0.09, 0.21], [0.21, 0.49]])
    assert (cropped - expected).abs().max() < 30  # more than three standard deviations


@pytest.mark.parametrize(("name", "share"), [("cats_original", 0.5), ("transformatcher", 0.5), ("cats", 0.7)])
def test_how_often_each_recipe_crops(name: str, share: float) -> None:
    before, count = sample(0), 0
    for seed in range(200):
        after = create_augment(name)(before, generator(seed))
        count += sum(bool((getattr(after, s) != getattr(before, s)).any()) for s in ("src_size", "trg_size"))
    assert count / 400 == pytest.approx(share, abs=0.08)  # more than three standard deviations


@pytest.mark.parametrize("name", ["cats", "transformatcher"])
def test_a_crop_around_nothing_is_an_error(name: str) -> None:
    bare = sample(0, boxes=False)
    bare = bare._replace(src_kps=bare.src_kps[:0], trg_kps=bare.trg_kps[:0], kps_mask=bare.kps_mask[:0])
    with pytest.raises(ZooError, match="around boxes or keypoints"):
        for seed in range(20):
            create_augment(name)(bare, generator(seed))


@pytest.mark.parametrize("single", [False, True])
def test_crops_around_keypoints_reach_their_margin_and_cut_the_box(single: bool) -> None:
    before = sample(0, size=(96, 128))
    kps = torch.tensor([[60.0, 50.0]] if single else [[60.0, 50.0], [70.0, 60.0]])
    whole = torch.tensor([0.0, 0.0, 96.0, 60.0])
    before = before._replace(src_kps=kps, trg_kps=kps, kps_mask=torch.ones(len(kps), dtype=torch.bool), src_box=whole)
    scale = torch.tensor([128.0, 96.0]) / before.src_size  # of the source's original pixels
    low = kps[0] / 2 if single else kps[0] - 20 * scale
    high = (kps[0] + torch.tensor([128.0, 96.0])) / 2 if single else kps[1] + 20 * scale
    starts, ends = [], []
    for seed in range(400):
        after = crop(before, generator(seed), p=1.0, around="keypoints")
        part = after.src_size * scale
        start = kps[0] - after.src_kps[0] * part / torch.tensor([128.0, 96.0])
        starts.append(start)
        ends.append(start + part)
        torch.testing.assert_close(after.src_box, torch.cat([torch.zeros(2), after.src_size]), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.stack(starts).amax(0), low.floor().clamp(min=0), atol=1e-2, rtol=0)
    torch.testing.assert_close(
        torch.stack(ends).amin(0), torch.minimum(high.floor(), torch.tensor([128.0, 96.0])), atol=1e-2, rtol=0
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.floats(-2, 70), min_size=4, max_size=4))
def test_crops_of_any_box_are_valid(seed: int, corners: list[float]) -> None:
    """Boxes that touch or cross the border, or are thinner than a pixel: keypoints end within [0, S - 1]."""
    x, y = sorted(corners[:2]), sorted(corners[2:])
    box = torch.tensor([x[0] * 1.5, y[0], x[1] * 1.5, y[1]])
    after = crop(sample(0)._replace(src_box=box), generator(seed), p=1.0)
    assert after.src_img.shape == (3, 48, 64)
    assert (after.src_kps >= 0).all() and (after.src_kps <= torch.tensor([63.0, 47.0])).all()
    assert (after.src_size > 0).all()


def test_padding_rows_stay_zero() -> None:
    before = sample(1)
    pad = torch.zeros(1, 2)
    padded = before._replace(
        src_kps=torch.cat([before.src_kps, pad]),
        trg_kps=torch.cat([before.trg_kps, pad]),
        kps_mask=torch.tensor([True, True, True, False]),
    )
    after, plain = crop(padded, generator(3), p=1.0), crop(before, generator(3), p=1.0)
    assert (after.src_kps[3] == 0).all() and torch.equal(after.src_kps[:3], plain.src_kps)


@pytest.mark.parametrize("name", RECIPES)
def test_the_generator_decides_everything(name: str) -> None:
    before = sample(2)
    kept = [value.clone() for value in before]
    state = torch.get_rng_state()
    runs = [create_augment(name)(before, generator(seed)) for seed in (5, 5, *range(6, 12))]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert any(not torch.equal(runs[0].src_img, run.src_img) for run in runs[2:])
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))  # the sample given is left alone


def test_each_image_has_its_own_colours() -> None:
    colours = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator(0))
    pairs = [sample(0)._replace(src_img=colours, trg_img=colours)] * 20
    changed = [create_augment("photometric")(pair, generator(seed)) for seed, pair in enumerate(pairs)]
    assert sum(not torch.equal(pair.src_img, pair.trg_img) for pair in changed) > 10
    assert all(torch.equal(pair.src_kps, pairs[0].src_kps) for pair in changed)


def test_seven_changes_each_one_time_in_five(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ("rgb_to_grayscale", "posterize", "equalize", "solarize")
    names = (*theirs, "_sharpen", "_brightness_contrast", "_jitter")
    calls: list[str] = []
    for name in names:
        owner = module.TF if name in theirs else module
        monkeypatch.setattr(owner, name, lambda image, *args, name=name, **options: calls.append(name) or image)
    rng = generator(0)
    for _ in range(1000):
        recolour(torch.zeros(3, 2, 2, dtype=torch.uint8), rng)
    assert all(150 < calls.count(name) < 250 for name in names)


def test_sharpening_is_albumentations_kernel() -> None:
    """Inside the border, away from clipping: (1 - a) x + a (8 x - neighbours + l x), computed with loops in float64."""
    image = torch.randint(110, 122, (3, 9, 9), dtype=torch.uint8, generator=generator(1))
    got = module._sharpen(image, generator(4))
    rng = generator(4)
    a, l = module.uniform(0.2, 0.5, rng), module.uniform(0.5, 1.0, rng)  # noqa: E741 - the formula's own letter
    for c in range(3):
        for y in range(1, 8):
            for x in range(1, 8):
                centre = float(image[c, y, x])
                around = sum(float(image[c, y + j, x + i]) for i in (-1, 0, 1) for j in (-1, 0, 1)) - centre
                expected = (1 - a) * centre + a * (8 * centre - around + l * centre)
                # The lightness scales the sharpened value: they agree up to (1 - a + a l) on the difference term.
                ours = (centre + a * (8 * centre - around)) * (1 - a + a * l)
                # torchvision rounds the blurred image, whose weight is 13 a here, to whole levels.
                assert abs(float(got[c, y, x]) - ours) <= 13 * a * 0.5 + 2
                assert abs(ours - expected) <= abs(a * (8 * centre - around)) * a * (1 - l) + 1e-9


def test_brightness_and_contrast_follow_albumentations() -> None:
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    got = module._brightness_contrast(image, generator(2)).long()
    rng = generator(2)
    contrast, brightness = module.uniform(0.8, 1.2, rng), module.uniform(-0.2, 0.2, rng)
    for value in range(256):
        expected = min(max(value * contrast + 255 * brightness, 0), 255)
        assert abs(int(got[0, value // 16, value % 16]) - expected) < 1


def test_names_of_augmentations() -> None:
    assert create_augment("none") is None
    assert {"none", "flip", "photometric", "cats"} <= set(list_augments())
    with pytest.raises(ZooError, match="did you mean 'cats'"):
        create_augment("cat")
