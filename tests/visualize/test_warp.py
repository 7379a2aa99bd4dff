import pytest
import torch

from corrzoo import visualize
from corrzoo.types import ZooError

CORNERS = torch.tensor([[4.0, 3.0], [20.0, 4.0], [5.0, 17.0], [22.0, 18.0]])


def smooth_image(h, w):
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([5 * x, 5 * y, 2 * (x + y)]).byte()


def value_at(image, x, y):
    """The image at a continuous point, from the four pixels around it."""
    x, y = x - 0.5, y - 0.5
    i, j, a, b = int(x), int(y), x - int(x), y - int(y)
    p = image.double()
    return (1 - b) * ((1 - a) * p[:, j, i] + a * p[:, j, i + 1]) + b * (
        (1 - a) * p[:, j + 1, i] + a * p[:, j + 1, i + 1]
    )


def test_a_spline_shows_every_source_point_at_its_match():
    """Matches at pixel centres, so that the warped image can be read there without interpolating once more."""
    image = smooth_image(24, 30)
    src = torch.tensor([[4.2, 3.1], [20.4, 5.6], [6.5, 17.3], [22.9, 18.2], [12.6, 11.9]])
    trg = torch.tensor([[6.5, 5.5], [25.5, 3.5], [4.5, 20.5], [27.5, 24.5], [18.5, 12.5]])
    warped = visualize.tps_warp(image, src, trg, (28, 32))
    assert warped.shape == (3, 28, 32)
    for (x, y), (u, v) in zip(src.tolist(), trg.int().tolist(), strict=True):
        assert warped[:, v, u].tolist() == pytest.approx(value_at(image, x, y).tolist(), abs=0.51)


def test_a_shift_is_a_shift_and_what_is_outside_is_paper():
    image = smooth_image(24, 30)
    warped = visualize.tps_warp(image, CORNERS, CORNERS + torch.tensor([3.0, 2.0]), (24, 30))
    assert torch.equal(warped[:, 2:, 3:], image[:, :-2, :-3])
    assert (warped[:, :2] == 255).all() and (warped[:, :, :3] == 255).all()


def test_places_that_determine_no_spline_are_named():
    image = smooth_image(24, 30)
    for kps in (CORNERS[:2], CORNERS[:1].repeat(5, 1), torch.tensor([[1.0, 1], [5, 5], [9, 9], [20, 20]])):
        with pytest.raises(ZooError, match="three that are not on one line"):
            visualize.tps_warp(image, CORNERS[: len(kps)], kps, (24, 30))
    twice = torch.cat([CORNERS, CORNERS[:1]])  # the first of two that claim one place counts
    other = torch.cat([CORNERS, torch.tensor([[9.0, 9.0]])])
    assert torch.equal(
        visualize.tps_warp(image, other, twice, (24, 30)), visualize.tps_warp(image, CORNERS, CORNERS, (24, 30))
    )


def test_a_flow_pulls_the_target_into_the_sources_frame():
    target = smooth_image(20, 26)
    flow = torch.tensor([4.0, 3.0]).view(2, 1, 1).expand(2, 12, 30)
    warped = visualize.flow_warp(target, flow)
    assert torch.equal(warped[:, :, :22], target[:, 3:15, 4:26])
    assert (warped[:, :, 22:] == 255).all()


def test_a_pair_that_gives_no_warp_does_not_lose_the_picture():
    images = smooth_image(24, 30).expand(2, -1, -1, -1)
    figure = visualize.draw_warps(images, images, [CORNERS, CORNERS[:2]], [CORNERS + 1, CORNERS[:2]])
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 1, 1, 0, 1]
    assert "2 distinct matches" in figure.axes[4].texts[0].get_text()
    visualize.to_array(figure)
