"""User images: points and flow in original pixels, for every head."""

import numpy as np
import pytest
import torch
from PIL import Image

import corrzoo
from corrzoo import inference as imagepair
from corrzoo.types import ZooError
from small import CASES, build


def matcher(head="Baseline", **options):
    return build(head, **options)


@pytest.fixture(scope="module")
def images():
    """A synthetic scene at 120 x 90 pixels, and the same at 200 x 180."""
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=160)
    image = dataset.read_image(0)
    return image.resize((120, 90)), image.resize((200, 180))


def test_an_image_matches_its_own_enlargement(images):
    model = matcher(stride=4, readout="window", temperature=0.02, point_query="features")
    found = imagepair.match_images(model, *images, [[30, 40], [90.5, 60.25]], size=128)
    expected = found.src_points * torch.tensor([200 / 120, 180 / 90])
    assert (found.trg_points - expected).abs().max() < 5
    assert found.src_points.tolist() == [[30, 40], [90.5, 60.25]] and found.cycle_error.max() < 3
    assert not model.training


def test_the_flow_is_in_original_pixels(images):
    pair = imagepair.open_pair(matcher(readout="identity"), *images, size=64)
    flow = pair.flow()
    assert flow.shape == (2, 90, 120) and flow.dtype == torch.float32
    for x, y in ((0, 0), (119, 89), (17, 60)):  # pixel (x, y) has its centre half a pixel further
        u, v = flow[:, y, x].tolist()
        assert (x + 0.5 + u, y + 0.5 + v) == pytest.approx(((x + 0.5) * 200 / 120, (y + 0.5) * 180 / 90), abs=1e-3)


def test_without_points_cycle_consistent_grid_points_are_matched(images):
    pair = imagepair.open_pair(matcher(stride=4, readout="argmax"), *images, size=64)
    found = pair.confident_matches()
    points = [((i + 0.5) * 12, (j + 0.5) * 9) for j in range(imagepair.GRID) for i in range(imagepair.GRID)]
    kept = []
    for point in points:  # one by one, there and back
        there = pair.match([point])
        back = pair.swapped().match(there)[0]
        if ((back[0] - point[0]) ** 2 + (back[1] - point[1]) ** 2) ** 0.5 <= 0.25 * 12:
            kept.append(point)
    assert 0 < len(kept) < len(points)
    assert found.src_points.tolist() == [list(point) for point in kept]
    assert (found.cycle_error <= 3).all()
    assert torch.equal(pair.match(found.src_points), found.trg_points)


@pytest.mark.parametrize("head", CASES)
def test_every_head_matches_images_that_are_not_square(head, images):
    pair = imagepair.open_pair(matcher(head), *images, size=(64, 96))
    found = pair.match_both_ways([[10, 20], [60, 45]])
    assert all(torch.isfinite(field).all() for field in found) and found.trg_points.shape == (2, 2)
    assert pair.flow().shape == (2, 90, 120)
    heat = pair.heat_map((60, 45))
    assert torch.equal(heat, pair.heat_map(torch.tensor([60.0, 45.0])))
    assert heat.ndim == 2 and torch.isfinite(heat).all() and heat.std() > 0
    h, w = heat.shape
    assert h == w if head in ("ACTR", "CATs", "GSF", "GeoAware", "LPMFlow", "TransforMatcher") else h * 96 == w * 64


def test_the_heat_map_is_highest_at_the_match(images):
    pair = imagepair.open_pair(matcher(stride=4, readout="argmax", point_query="features"), *images, size=64)
    for point in ((30, 40), (90.5, 60.25), (5, 80)):
        heat = pair.heat_map(point)
        y, x = divmod(int(heat.argmax()), heat.shape[1])
        centre = (x + 0.5) * 200 / heat.shape[1], (y + 0.5) * 180 / heat.shape[0]
        assert pair.match([point])[0].tolist() == pytest.approx(centre, abs=1e-3)


def test_heat_maps_interpolate_the_correlation_of_four_cells(images):
    model = matcher("LPMFlow").eval()
    pair = imagepair.open_pair(model, *images, size=64)
    correlation = model.match(pair.src_features, pair.trg_features).correlation[0]  # fine cells of 8 network pixels
    x, y = 30 * 64 / 120 / 8 - 0.5, 40 * 64 / 90 / 8 - 0.5
    i, j, a, b = int(x), int(y), x - int(x), y - int(y)
    row = sum(
        wx * wy * correlation[(j + dy) * 8 + i + dx]
        for dx, wx in ((0, 1 - a), (1, a))
        for dy, wy in ((0, 1 - b), (1, b))
    )
    torch.testing.assert_close(pair.heat_map((30, 40)).flatten(), row)


def test_foreground_maps_are_similarities_to_the_mean_class_token():
    model = matcher().eval()
    src, trg = (torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8) for _ in range(2))
    maps = imagepair.foreground_maps(model.backbone, src, trg)
    assert maps.shape == (2, 4, 3)
    seen = [model.backbone(image) for image in (src, trg)]
    for b in range(2):
        mean = (seen[0].cls[b] + seen[1].cls[b]) / 2
        cosines = torch.stack([torch.cosine_similarity(c, mean, dim=0) for c in seen[0].maps[-1][b].flatten(1).T])
        cosines = (cosines - cosines.min()) / (cosines.max() - cosines.min())
        torch.testing.assert_close(maps[b].flatten(), cosines)
    cnn = corrzoo.create_matcher("Baseline", backbone="timm/test_resnet.r160_in1k", weights="random").eval()
    with pytest.raises(ZooError, match="no class token"):
        imagepair.foreground_maps(cnn.backbone, src, trg)


def test_paths_images_and_pixels_give_the_same_matches(images, tmp_path):
    model = matcher()
    for image, name in zip(images, "ab", strict=True):
        image.save(tmp_path / f"{name}.png")
    pixels = [np.asarray(image) for image in images]
    given = [
        images,
        (tmp_path / "a.png", str(tmp_path / "b.png")),
        pixels,
        [torch.from_numpy(p.copy()).permute(2, 0, 1) for p in pixels],
        [torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in pixels],
        [p / 255 for p in pixels],
    ]
    answers = [imagepair.match_images(model, *pair, [[30, 40]], size=64).trg_points for pair in given]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("head", ["Baseline", "ViTSC"])
def test_a_batch_equals_its_pairs(images, head):
    model = matcher(head)
    sources, targets = [images[0], images[1], images[0]], [images[1], images[0], images[0]]
    points = [[[30, 40], [90.5, 60.25]], [[10, 20]], torch.zeros(0, 2)]
    found = imagepair.match_batch(model, sources, targets, points, size=64)
    for source, target, asked, matches in zip(sources, targets, points, found, strict=True):
        alone = imagepair.match_images(model, source, target, asked, size=64)
        for one, other in zip(matches, alone, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    stacked = torch.rand(2, 3, 40, 50)
    assert [len(m.trg_points) for m in imagepair.match_batch(model, stacked, stacked, points[1:], size=64)] == [1, 0]


def test_no_points_have_no_matches(images):
    """Not a grid's, which are those of None."""
    for none in ([], torch.zeros(0, 2), np.zeros((0, 2))):
        found = imagepair.match_images(matcher(), *images, none, size=64)
        assert found.src_points.shape == found.trg_points.shape == (0, 2) and found.cycle_error.shape == (0,)


class OnAGpu(torch.Tensor):
    """A tensor of another device: `cpu()` gives a plain tensor, and nothing else may be done with it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.cpu:
                return args[0].as_subclass(torch.Tensor)
            if function in (torch.Tensor.to, torch.Tensor.double, torch.as_tensor):
                return function(*args, **(kwargs or {})).as_subclass(OnAGpu)
        raise RuntimeError("Expected all tensors to be on the same device")


def test_points_may_be_on_another_device(images):
    pair = imagepair.open_pair(matcher(), *images, size=64)
    points = torch.tensor([[30.0, 40.0]], dtype=torch.float64)
    there = points.as_subclass(OnAGpu)
    assert torch.equal(pair.match(there), pair.match(points))
    assert torch.equal(pair.match_both_ways(there).cycle_error, pair.match_both_ways(points).cycle_error)


def test_a_batch_of_unequal_parts_is_an_error(images):
    with pytest.raises(ZooError, match="1 source images, 2 target images, 1 sets of points"):
        imagepair.match_batch(matcher(), images[:1], images, [[[1, 2]]])


@pytest.mark.parametrize("colour", ["black", "grey"])
def test_nothing_is_a_confident_match_on_an_image_without_structure(images, colour):
    blank = Image.new("RGB", (80, 60), colour)
    for pair in ((blank, blank), (blank, images[0]), (images[0], blank)):
        assert len(imagepair.match_images(matcher(), *pair, size=64).src_points) == 0
    with_points = imagepair.match_images(matcher(), blank, blank, [[10, 20]], size=64)
    assert len(with_points.src_points) == 1  # points that a user gives are always matched


def test_cells_without_structure_are_left_out():
    image = Image.new("RGB", (100, 100), "white")
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    image.paste(Image.fromarray(noise), (50, 0))  # the top right quarter
    model = matcher(readout="identity")  # each point is its own match
    found = set(map(tuple, imagepair.match_images(model, image, image, size=96).src_points.tolist()))
    inside = {(55 + 10 * x, 5 + 10 * y) for x in range(5) for y in range(5)}
    assert inside <= found and all(x >= 45 and y <= 55 for x, y in found)  # resizing blurs the edge a little


def test_floats_beyond_one_are_an_error(images):
    with pytest.raises(ZooError, match="expected floats from 0 to 1"):
        imagepair.match_images(matcher(), torch.randn(3, 8, 8), images[0])


def test_errors_name_the_input(images):
    model = matcher()
    with pytest.raises(ZooError, match=r"point \(120\.5, 3\) lies outside the source image of 120x90"):
        imagepair.match_images(model, *images, [[120, 90], [120.5, 3]], size=64)
    with pytest.raises(ZooError, match=r"shape \(n, 2\)"):
        imagepair.match_images(model, *images, [1, 2, 3], size=64)
    for points in ([[1, 2], [3]], "abc", [["1", "x"]], [{}], [[10**400, 1]]):
        with pytest.raises(ZooError, match=r"expected points of shape \(n, 2\)"):
            imagepair.match_images(model, *images, points, size=64)
    with pytest.raises(ZooError, match="outside"):
        imagepair.match_images(model, *images, [[float("nan"), 3]], size=64)
    with pytest.raises(ZooError, match="no image file"):
        imagepair.match_images(model, "nowhere.png", images[1])
    with pytest.raises(ZooError, match="multiples of its patch of 16"):
        imagepair.match_images(model, Image.new("RGB", (5, 5)), images[1], size=70)
