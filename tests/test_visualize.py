import pytest
import torch

from corrzoo import visualize
from corrzoo.types import ZooError

IMAGES = torch.full((1, 3, 40, 60), 127, dtype=torch.uint8)
POINTS = [torch.tensor([[10.0, 10.0], [50.0, 30.0]])]


def figure(right):
    return visualize.draw_matches(IMAGES, IMAGES, POINTS, POINTS, [torch.tensor(right)], POINTS, ["a pair"])


def colours(array):
    r, g, b = array.reshape(-1, 3).int().unbind(1)
    return ((g > r + 60) & (g > b + 30)).sum().item(), ((r > g + 100) & (r > b + 100)).sum().item()


def test_right_and_wrong_differ_in_colour_and_in_form():
    green, red = colours(visualize.to_array(figure([True, True])))
    green_mixed, red_mixed = colours(visualize.to_array(figure([True, False])))
    assert green > green_mixed > 0 and red_mixed > red  # the legend has a little of both
    styles = [line.get_linestyle() for line in figure([True, False]).artists]
    assert styles[0] == "-" and styles[1] != "-"


def test_it_is_saved_and_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    path = visualize.save_figure(figure([True, False]), tmp_path / "deeper" / "m.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="cannot write"):
        visualize.save_figure(figure([True, True]), tmp_path / "file" / "m.png")
