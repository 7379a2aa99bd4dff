import torch

from corrzoo import visualize


def test_the_brightest_place_is_where_the_scores_are_highest_and_the_match_is_marked_there():
    image = torch.full((1, 3, 40, 60), 127, dtype=torch.uint8)
    heat = torch.zeros(1, 4, 6)
    heat[0, 2, 1] = 1  # its centre is at (15, 25)
    point, match = torch.tensor([[30.0, 20.0]]), torch.tensor([[15.0, 25.0]])
    figure = visualize.draw_heat(image, image, point, heat, match, match + 5, ["a pair"])
    source, target = figure.axes
    assert [line.get_xydata().tolist() for line in source.lines] == [point.tolist()]
    assert [line.get_xydata().tolist() for line in target.lines] == [(match + 5).tolist(), match.tolist()]
    assert target.lines[0].get_marker() != target.lines[1].get_marker()
    shown = target.images[1].get_array()
    y, x = divmod(int(shown.argmax()), shown.shape[1])
    assert abs((x + 0.5) / shown.shape[1] * 60 - 15) < 2 and abs((y + 0.5) / shown.shape[0] * 40 - 25) < 2
    assert visualize.to_array(figure).ndim == 3


def test_a_map_of_one_value_can_be_drawn():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    visualize.to_array(visualize.draw_foreground([image], [torch.ones(1, 1)]))
