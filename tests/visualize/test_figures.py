import pytest
import torch

from corrzoo import visualize
from corrzoo.types import ZooError


def test_it_is_saved_and_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    image = torch.full((3, 20, 30), 127, dtype=torch.uint8)
    figure = visualize.draw_foreground([image, image[:, :, :10]], [torch.rand(4, 6), torch.rand(5, 5)])
    path = visualize.save_figure(figure, tmp_path / "deeper" / "m.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="cannot write"):
        visualize.save_figure(figure, tmp_path / "file" / "m.png")


def test_a_picture_that_cannot_be_finished_leaves_the_last_one(tmp_path, monkeypatch):
    figure = visualize.draw_foreground([torch.zeros(3, 20, 30, dtype=torch.uint8)], [torch.rand(4, 6)])
    path = visualize.save_figure(figure, tmp_path / "m.png")
    before = path.read_bytes()

    def fill_the_disk(partial, **options):
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_the_disk)
    with pytest.raises(ZooError, match="No space left on device"):
        visualize.save_figure(figure, path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_each_row_is_as_high_as_its_images_need():
    wide, tall = torch.zeros(3, 10, 40, dtype=torch.uint8), torch.zeros(3, 40, 20, dtype=torch.uint8)
    figure = visualize.draw_foreground([wide, tall], [torch.rand(2, 2), torch.rand(2, 2)])
    figure.canvas.draw()
    first, second = (figure.axes[row].get_window_extent() for row in (0, 2))
    assert first.width / first.height == pytest.approx(4, rel=0.1)
    assert second.height / second.width == pytest.approx(2, rel=0.1)


def test_a_photograph_is_shrunk_and_a_strip_does_not_make_a_tower():
    photo, strip = torch.full((3, 10, 5000), 90, dtype=torch.uint8), torch.zeros(3, 3000, 6, dtype=torch.uint8)
    figure = visualize.draw_flow([photo, strip], [torch.rand(2, 10, 5000), torch.rand(2, 3000, 6)])
    drawn = [axes.images[0].get_array() for axes in figure.axes]
    assert max(side for pixels in drawn for side in pixels.shape) <= 2048
    assert (drawn[0] == 90).all() and drawn[0].shape == (4, 1667, 3)
    assert figure.axes[0].get_xlim() == (0, 5000)  # where points are drawn, pixels are those of the image
    assert figure.get_figheight() < 5.2 * figure.get_figwidth() / 2  # two rows beside two columns
