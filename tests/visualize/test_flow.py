"""Flow colours and the Middlebury file format, re-derived from the paper's description."""

import math
import struct

import pytest
import torch

from corrzoo import visualize
from corrzoo.types import ZooError


def wheel():
    """55 whole-numbered colours: red to yellow in 15 steps, green 6, cyan 4, blue 11, magenta 13, red 6."""
    corners = [(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0)]
    colours = []
    for steps, start, end in zip((15, 6, 4, 11, 13, 6), corners, corners[1:], strict=False):
        for step in range(steps):
            part = 255 * step // steps  # rounded down on the way up and on the way down
            colours.append([a + (b - a) // 255 * part for a, b in zip(start, end, strict=True)])
    return colours


def expected(u, v, limit):
    length, place = math.hypot(u, v) / limit, (math.atan2(-v, -u) / math.pi + 1) / 2 * 54
    low, share = int(place), place - int(place)
    rim = [(1 - share) * a + share * b for a, b in zip(wheel()[low], wheel()[(low + 1) % 55], strict=True)]
    return [255 - min(length, 1) * (255 - c) for c in rim]


@pytest.mark.parametrize("length", [0.3, 1.0, 1.7])
def test_colours_follow_the_colour_wheel(length):
    for angle in range(0, 360, 7):
        u, v = (length * f(math.radians(angle)) for f in (math.cos, math.sin))
        colour = visualize.flow_colours(torch.tensor([u, v]).double().view(2, 1, 1), 1.0000001)
        assert colour.flatten().tolist() == pytest.approx(expected(u, v, 1.0000001), abs=1.01)


def test_known_directions():
    right, down, left, still = visualize.flow_colours(
        torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, 0]]).unsqueeze(1)
    ).int()[:, 0].T.tolist()  # fmt: skip
    assert right[0] == 255 and max(right[1:]) < 50  # red
    assert min(down[:2]) > 200 and down[2] == 0  # yellow
    assert left[0] == 0 and min(left[1:]) > 190  # cyan
    assert still == [255, 255, 255]


def scales(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_picture_states_the_length_in_full_colour():
    flow = torch.zeros(2, 8, 12)
    flow[0] = 5
    flow[:, 0, 0] = 1000  # an outlier does not set the scale
    figure = visualize.draw_flow([torch.zeros(3, 16, 24, dtype=torch.uint8)], [flow])
    assert scales(figure) == ["full colour: 5 px"]
    visualize.to_array(figure)
    visualize.to_array(visualize.draw_flow([torch.zeros(3, 16, 24, dtype=torch.uint8)], [torch.zeros(2, 1, 1)]))


def test_shared_scale_is_that_of_all_rows():
    images, flows = [torch.zeros(3, 16, 24, dtype=torch.uint8)] * 2, [torch.full((2, 8, 12), v) for v in (3.0, 6.0)]
    assert scales(visualize.draw_flow(images, flows)) == ["full colour: 4 px", "full colour: 8 px"]
    assert scales(visualize.draw_flow(images, flows, shared=True)) == ["full colour: 8 px", "full colour: 8 px"]


def test_flo_file_has_the_middlebury_format(tmp_path):
    flow = torch.arange(12.0).view(2, 2, 3) / 7
    content = visualize.write_flo(flow, tmp_path / "a.flo").read_bytes()
    tag, width, height = struct.unpack("<fii", content[:12])
    assert (tag, width, height) == (202021.25, 3, 2)  # the format's check value, which spells PIEH
    values = struct.unpack("<12f", content[12:])
    for y in range(2):
        for x in range(3):
            assert values[2 * (3 * y + x) :][:2] == tuple(flow[:, y, x].tolist())
    with pytest.raises(ZooError, match="cannot write"):
        visualize.write_flo(flow, tmp_path / "a.flo" / "b.flo")
