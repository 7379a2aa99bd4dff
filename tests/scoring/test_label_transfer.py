"""Label transfer against scikit-image's documented results, loops over pixels, and hand counts."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from corrzoo.data import DATASETS
from corrzoo.scoring.evaluation import Evaluation
from corrzoo.scoring.label_transfer import LabelTransfer, polygon_mask, warp_mask
from corrzoo.types import ZooError


def test_polygon_mask_equals_scikit_images_documented_results() -> None:
    """Masks of its documentation and a pixel count of its tests (skimage.draw.polygon, polygon2mask)."""
    mask = polygon_mask(torch.tensor([[1, 1], [7, 2], [4, 8]]), (10, 10))
    runs = {1: (1, 1), 2: (2, 7), 3: (2, 6), 4: (3, 6), 5: (3, 5), 6: (4, 5), 7: (4, 4), 8: (4, 4)}
    for y in range(10):
        first, last = runs.get(y, (1, 0))
        assert mask[y].nonzero().flatten().tolist() == list(range(first, last + 1))
    rows, columns = [80, 111, 146, 234, 407, 300, 187, 45], [465, 438, 499, 380, 450, 287, 210, 167]
    assert polygon_mask(torch.tensor([columns, rows]).T, (512, 512)).sum() == 57653


def test_polygon_mask_equals_a_loop_over_pixels() -> None:
    """A pixel is inside if a ray to the right crosses an odd number of edges, or if it lies on an edge."""
    rng = random.Random(0)
    for trial in range(20):
        whole = trial % 2 == 0  # whole vertices fall on pixels and edges all the time
        poly = [(rng.uniform(-3, 15), rng.uniform(-3, 12)) for _ in range(rng.randint(3, 7))]
        poly = [(round(x), round(y)) if whole else (x, y) for x, y in poly]
        mask = polygon_mask(torch.tensor(poly), (12, 9))
        for y in range(9):
            for x in range(12):
                crossings, on_edge = 0, False
                for (ax, ay), (bx, by) in zip(poly, poly[1:] + poly[:1], strict=True):
                    if (ay > y) != (by > y) and ax + (y - ay) * (bx - ax) / (by - ay) > x:
                        crossings += 1
                    along = math.dist((ax, ay), (x, y)) + math.dist((x, y), (bx, by)) - math.dist((ax, ay), (bx, by))
                    on_edge |= abs(along) < 1e-12
                assert mask[y, x].item() == (on_edge or crossings % 2 == 1)


def test_polygons_outside_the_image_and_invalid_polygons() -> None:
    assert polygon_mask(torch.tensor([[-9, -9], [30, -9], [30, 30], [-9, 30]]), (4, 3)).all()
    assert not polygon_mask(torch.tensor([[20, 20], [30, 20], [30, 30]]), (4, 3)).any()
    for bad in ([[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0], [math.nan, 2.0]]):
        with pytest.raises(ZooError, match="three or more vertices with finite"):
            polygon_mask(torch.tensor(bad), (4, 3))


def test_warp_mask_shifts_by_whole_pixels() -> None:
    mask = polygon_mask(torch.tensor([[3, 2], [8, 2], [8, 6], [3, 6]]), (12, 9))
    y, x = torch.meshgrid(torch.arange(9) + 0.5, torch.arange(14) + 0.5, indexing="ij")
    warped = warp_mask(mask, torch.stack([x - 2, y + 1], dim=-1))  # target (x, y) comes from source (x - 2, y + 1)
    want = torch.zeros(9, 14, dtype=torch.bool)
    want[1:6, 5:11] = True
    assert torch.equal(warped, want)
    assert not warp_mask(torch.ones(4, 4, dtype=torch.bool), torch.full((2, 2, 2), 40.0)).any()


def test_label_transfer_equals_hand_counts() -> None:
    """A 6 x 5 rectangle in a 12 x 9 image, transferred with an error of two columns, one, or none."""
    gt, two, one = (
        polygon_mask(torch.tensor([[3 + off, 2], [8 + off, 2], [8 + off, 6], [3 + off, 6]]), (12, 9))
        for off in (0, 2, 1)
    )
    metric = LabelTransfer(["cup", "lamp"])
    for index, polygon, mask, category in ((7, two, one, 1), (2, gt, gt, 0), (7, two, one, 1)):  # a repeat counts once
        metric.update(polygon, mask, gt, index, category)
    got = metric.compute()
    assert {key: value.item() for key, value in got.items()} == pytest.approx(
        {
            "lt_acc_polygon": 100 * ((108 - 20) / 108 + 1) / 2,
            "iou_polygon": 100 * (20 / 40 + 1) / 2,
            "lt_acc_mask": 100 * ((108 - 10) / 108 + 1) / 2,
            "iou_mask": 100 * (25 / 35 + 1) / 2,
        }
    )
    first, second = metric.rows()
    assert first == {"index": 2, "category": "cup"} | dict.fromkeys(got, 100.0)
    assert (second["index"], second["category"], second["iou_polygon"]) == (7, "lamp", 50.0)
    assert metric.breakdown()["category"]["lamp"] == {"pairs": 1} | {key: second[key] for key in got}
    for polygon, mask, target in ((gt, gt, gt[:5]), (gt, gt[:5], gt), (gt, gt, torch.zeros_like(gt))):
        with pytest.raises(ZooError, match="expected masks of one shape"):
            metric.update(polygon, mask, target, 0)


@pytest.mark.parametrize("protocol", ["default", "ncnet", "proposalflow", "weakalign"])
def test_outlines_are_scored_under_every_protocol(protocol: str) -> None:
    """A protocol of PCK does not concern them, such as one without boxes."""
    caltech = DATASETS["caltech101"]
    dataset = SimpleNamespace(threshold=caltech.threshold, outlines=True, categories=caltech.categories)
    loader: object = SimpleNamespace(dataset=dataset)
    evaluation = Evaluation(SimpleNamespace(device="cpu"), loader, protocol, (0.1,), cache_mb=0)
    assert [type(metric) for metric in evaluation.metrics] == [LabelTransfer]
