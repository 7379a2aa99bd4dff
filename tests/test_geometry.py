"""The coordinate convention against plain loops and the released pseudo-flow."""

import numpy as np
import pytest
import torch

from corrzoo import geometry
from corrzoo.errors import ZooError
from hostless import hostless


def test_cell_centres_of_a_non_square_grid():
    centres = geometry.cell_centres((2, 3), (32, 60))
    assert centres.tolist() == [[10, 8], [30, 8], [50, 8], [10, 24], [30, 24], [50, 24]]


def test_resize_points_scales_each_axis_by_its_own_ratio():
    points = torch.tensor([[[10.0, 20.0], [0.0, 0.0]]])
    out = geometry.resize_points(points, torch.tensor([[100.0, 50.0]]), torch.tensor([[200.0, 25.0]]))
    assert out.tolist() == [[[20, 10], [0, 0]]]
    assert geometry.resize_points(points, (100, 50), torch.tensor([[200.0, 25.0]])).tolist() == out.tolist()
    assert geometry.resize_points(points[0], (100, 50), (200, 25)).tolist() == out[0].tolist()


def test_cells_to_pixels_and_back():
    cells = torch.tensor([[[0.0, 0.0], [1.5, 2.0], [4.0, 3.0]]], dtype=torch.float64)
    pixels = geometry.cells_to_pixels(cells, (3, 4), (30, 64))
    assert pixels.tolist() == [[[0, 0], [24, 20], [64, 30]]]
    assert geometry.pixels_to_cells(pixels, (3, 4), (30, 64)).tolist() == cells.tolist()


def test_sample_reads_a_linear_map_exactly_between_cell_centres():
    H, W, grid = 48, 64, (6, 8)
    x, y = geometry.cell_centres(grid, (H, W)).double().unbind(-1)
    plane = torch.stack([2 * x + 3 * y + 1, x - y]).view(1, 2, *grid)
    points = torch.tensor([[[4.0, 4.0], [17.3, 29.9], [60.0, 44.0]]], dtype=torch.float64)
    px, py = points.unbind(-1)
    expected = torch.stack([2 * px + 3 * py + 1, px - py], -1)
    torch.testing.assert_close(geometry.sample(plane, points, (H, W)), expected)


def test_sample_holds_the_border_value_outside():
    m = torch.arange(4.0).view(1, 1, 2, 2)
    points = torch.tensor([[[-5.0, -5.0], [0.0, 0.0], [100.0, 100.0]]])
    assert geometry.sample(m, points, (8, 8)).flatten().tolist() == [0, 0, 3]


def test_transfer_adds_the_flow_at_the_point():
    flow = torch.zeros(1, 2, 4, 4)
    flow[:, 0], flow[:, 1] = 5, -2
    out = geometry.transfer(torch.tensor([[[10.0, 10.0]]]), flow, (32, 32))
    assert out.tolist() == [[[15, 8]]]


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 5), (1, 1)])
def test_bilinear_cells_equal_sample(grid):
    image = (40, 56)
    maps = torch.randn(2, 3, *grid, dtype=torch.float64)
    points = torch.rand(2, 50, 2, dtype=torch.float64) * 80 - 10  # some outside
    cells, weights = geometry.bilinear_cells(points, grid, image)
    rows = maps.flatten(2).transpose(1, 2)
    read = torch.stack([(rows[b][cells[b]] * weights[b].unsqueeze(-1)).sum(1) for b in range(2)])
    torch.testing.assert_close(read, geometry.sample(maps, points, image))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 50, dtype=torch.float64))


def test_points_to_flow_and_back():
    grid, image = (3, 5), (24, 40)
    target = torch.rand(1, 15, 2) * 24
    flow = geometry.points_to_flow(target, grid, image)
    centres = geometry.cell_centres(grid, image).unsqueeze(0)
    torch.testing.assert_close(geometry.transfer(centres, flow, image), target)


def pseudo_flow_by_loops(src, trg, n, grid, image, radius):
    """CATs' construction, cell by cell."""
    (h, w), (H, W) = grid, image
    flow, covered = np.zeros((2, h, w)), np.zeros((h, w), bool)
    for r in range(h):
        for c in range(w):
            cx, cy = int((c + 0.5) * W / w), int((r + 0.5) * H / h)
            near = [k for k in range(n) if abs(src[k][0] - cx) <= radius and abs(src[k][1] - cy) <= radius]
            if near:
                covered[r, c] = True
                flow[:, r, c] = trg[near[-1]] - np.mean([src[k] for k in near], axis=0)
    return flow, covered


def test_pseudo_flow_equals_loops_and_ignores_padding():
    rng = np.random.default_rng(0)
    src, trg = rng.uniform(0, 64, (2, 9, 2)), rng.uniform(0, 64, (2, 9, 2))
    counts = [9, 4]
    mask = torch.arange(9) < torch.tensor(counts).unsqueeze(1)
    flow, covered = geometry.pseudo_flow(torch.tensor(src), torch.tensor(trg), mask, (8, 16), (64, 64), 9)
    for b, n in enumerate(counts):
        expected, where = pseudo_flow_by_loops(src[b], trg[b], n, (8, 16), (64, 64), 9)
        np.testing.assert_allclose(flow[b].numpy(), expected, atol=1e-12)
        assert (covered[b].numpy() == where).all()


def test_pseudo_flow_of_a_pair_without_keypoints_is_empty():
    kps = torch.zeros(1, 3, 2)
    flow, covered = geometry.pseudo_flow(kps, kps, torch.zeros(1, 3, dtype=torch.bool), (4, 4), (32, 32), 9)
    assert not covered.any() and not flow.any()
    with pytest.raises(ZooError, match="no keypoints"):
        geometry.pseudo_flow(kps[:, :0], kps[:, :0], torch.zeros(1, 0, dtype=torch.bool), (4, 4), (32, 32), 9)


@pytest.mark.parametrize("grid", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["kpflow", "kpflow_RE"])
def test_pseudo_flow_equals_the_released_code(shared, grid, name):
    data = np.load(shared / "golden" / "data.npz")
    src, trg = (torch.from_numpy(data[k]).double().transpose(1, 2) for k in ("src_kps", "trg_kps"))
    if name.endswith("RE"):
        src, trg = trg, src
    mask = torch.arange(40) < torch.from_numpy(data["n_pts"]).unsqueeze(1)
    flow, _ = geometry.pseudo_flow(src, trg, mask, (grid, grid), (512, 512), 17)
    np.testing.assert_allclose(flow.numpy() / (512 // grid), data[f"{name}_{grid}"], atol=1e-5)


def test_no_host_device_synchronisation():
    """Sizes are Python numbers. As tensors, they would be copied to the GPU."""
    grid, image = (4, 6), (32, 48)
    points = (torch.rand(2, 24, 2) * 40).requires_grad_()
    maps, mask = torch.randn(2, 3, *grid, requires_grad=True), torch.rand(2, 24) > 0.5
    with hostless():
        flow = geometry.points_to_flow(geometry.cells_to_pixels(points, grid, image), grid, image)
        read = geometry.sample(maps, geometry.transfer(points, flow, image), image)
        cosines = geometry.cosine_maps(maps, maps, points, image)
        cells, weights = geometry.bilinear_cells(points, grid, image)
        target, covered = geometry.pseudo_flow(points, points.flip(1), mask, grid, image, 9.0)
        loss = read.sum() + cosines.sum() + weights.square().sum() + (target * covered.unsqueeze(1)).sum()
        loss.backward()
        geometry.pixels_to_cells(points, grid, image), geometry.cell_centres(grid, image, points.device)
    assert cells.shape == (2, 24, 4)


def test_points_are_not_rounded_to_the_precision_of_the_maps():
    """A map of x coordinates; bfloat16 would round the points by up to half a pixel."""
    x = torch.arange(8.0) * 40 + 20
    points = torch.rand(1, 50, 2, generator=torch.Generator().manual_seed(0)) * 240 + 40
    found = geometry.sample(x.expand(1, 1, 8, 8).bfloat16(), points, (320, 320))
    assert torch.equal(found[..., 0], points[..., 0].bfloat16())
