import pytest
import torch

from corrzoo.heads.levels import resize, stack_levels


def test_a_level_of_the_right_size_stays_the_same_tensor():
    maps = torch.randn(1, 3, 4, 5)
    assert resize(maps, (4, 5)) is maps and stack_levels([maps], (4, 5)) is maps


def test_resizing_keeps_a_linear_ramp_where_cells_have_neighbours():
    ramp = (torch.arange(8.0) + 0.5).expand(1, 1, 8, 8)  # the coordinate of each cell's centre
    torch.testing.assert_close(resize(ramp, (8, 4)), ((torch.arange(4.0) + 0.5) * 2).expand(1, 1, 8, 4))


def test_aligned_corners_keep_the_outermost_values():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(resize(ramp, (8, 3), align_corners=True), torch.tensor([0, 3.5, 7]).expand(1, 1, 8, 3))


def test_channels_last_maps_stay_channels_last():
    tokens = torch.randn(2, 1 + 16, 20)[:, 1:]  # a ViT's, without its class token
    maps = tokens.mT.unflatten(2, (4, 4))
    stacked = stack_levels([maps, maps], (6, 5))
    for out in (resize(maps, (6, 5)), stacked):
        assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(resize(maps, (6, 5)), resize(maps.contiguous(), (6, 5)))


@pytest.mark.parametrize("sizes", [[(4, 4), (2, 2)], [(3, 5), (4, 4)]])
def test_levels_of_any_scale_weigh_the_same_in_every_cell(sizes):
    torch.manual_seed(0)
    maps = [torch.randn(2, 3 + k, *size) * 100**k for k, size in enumerate(sizes)]
    parts = stack_levels(maps, (4, 4)).split([3, 4], 1)
    for part in parts:
        torch.testing.assert_close(part.norm(dim=1), torch.ones(2, 4, 4))
