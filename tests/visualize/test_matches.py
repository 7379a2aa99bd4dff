import torch

from corrzoo import visualize

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


def test_matches_of_unknown_worth_are_numbered_alike_on_both_sides_and_have_no_legend():
    drawn = visualize.draw_matches([IMAGES[0]], [IMAGES[0, :, :20]], POINTS, POINTS)
    assert [[text.get_text() for text in ax.texts] for ax in drawn.axes] == [["1", "2"], ["1", "2"]]
    assert not drawn.legends
    first, second = drawn.artists
    assert first.get_edgecolor() != second.get_edgecolor()


def test_a_match_outside_the_image_leaves_the_picture_as_it_is():
    outside = [torch.tensor([[10.0, 10.0], [90.0, -30.0]])]
    usual, drawn = (visualize.draw_matches(IMAGES, IMAGES, POINTS, pred) for pred in (POINTS, outside))
    assert drawn.axes[1].get_xlim() == (0, 60) and drawn.axes[1].get_ylim() == (40, 0)
    for figure in (usual, drawn):
        visualize.to_array(figure)
    assert [ax.get_position().bounds for ax in drawn.axes] == [ax.get_position().bounds for ax in usual.axes]


def test_uncertain_matches_are_dashed_and_many_have_no_numbers():
    drawn = visualize.draw_matches(IMAGES, IMAGES, POINTS, POINTS, confident=[torch.tensor([True, False])])
    first, second = drawn.artists
    assert first.get_linestyle() == "-" and second.get_linestyle() != "-"
    many = [torch.rand(21, 2) * 40]
    drawn = visualize.draw_matches(IMAGES, IMAGES, many, many)
    assert len(drawn.artists) == 21 and not any(ax.texts for ax in drawn.axes)
