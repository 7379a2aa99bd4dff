"""The coordinate convention, and every conversion that follows from it. It is stated here and nowhere else.

Points are continuous (x, y) with the origin at the image's top-left corner. Pixel i covers [i, i + 1), so:

- resizing an image from (w, h) to (W, H) moves a point to (x * W / w, y * H / h), and nothing else;
- cell c of a feature grid with stride s has its centre at (c + 0.5) * s;
- reading a map between cell centres is `grid_sample(..., align_corners=False)`;
- mirroring a W pixels wide image moves x to W - x.

A flow (B, 2, h, w) holds, for each cell of the source grid, the displacement (dx, dy) from the cell's centre to its
match, in pixels of the network image. A head whose authors use another grid converts at its own border.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
"""(height, width), as tensors are laid out; an image's *original* size in a Record or Pair is (w, h)."""


def size_of(maps: Tensor) -> Size:
    """(h, w) of maps or images (..., h, w)."""
    return maps.shape[-2], maps.shape[-1]


def cell_centres(
    grid: Size, image: Size, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """(h*w, 2) centres of the cells of a (h, w) grid laid over a (H, W) image, row by row, in the image's pixels."""
    (h, w), (H, W) = grid, image
    y = (torch.arange(h, device=device, dtype=dtype or torch.float32) + 0.5) * (H / h)
    x = (torch.arange(w, device=device, dtype=dtype or torch.float32) + 0.5) * (W / w)
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([xx, yy], dim=-1).reshape(h * w, 2)


def resize_points(points: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Points (..., n, 2) of an image of size `old` (w, h), in the same image resized to `new` (w, h).

    Args:
        points: (..., n, 2).
        old: (..., 2) size (w, h) that the points live in.
        new: (..., 2) size (w, h) that they go to.
    """
    return points * (new / old).unsqueeze(-2)


def sample(maps: Tensor, points: Tensor, image: Size) -> Tensor:
    """Read maps (B, C, h, w) laid over a (H, W) image at points (B, n, 2), bilinearly.

    Outside the outermost cell centres the border's value holds (a flow has no reason to fall to zero there).

    Returns:
        (B, n, C).
    """
    H, W = image
    scale = points.new_tensor([W, H])
    grid = (2 * points / scale - 1).to(maps.dtype)
    out = F.grid_sample(maps, grid.unsqueeze(1), mode="bilinear", padding_mode="border", align_corners=False)
    return out.squeeze(2).transpose(1, 2)


def cosine_maps(src: Tensor, trg: Tensor, points: Tensor, image: Size) -> Tensor:
    """(B, n, h, w) cosines of source features (B, C, h', w') at points (B, n, 2) with target features (B, C, h, w)."""
    rows = F.normalize(sample(src, points, image), dim=2)
    return torch.einsum("bnc,bchw->bnhw", rows, F.normalize(trg, dim=1))


def transfer(points: Tensor, flow: Tensor, image: Size) -> Tensor:
    """Where a flow takes source points: (B, n, 2) in pixels of the (H, W) network image -> (B, n, 2) likewise."""
    return points + sample(flow, points, image).to(points.dtype)


def cells_to_pixels(cells: Tensor, grid: Size, image: Size) -> Tensor:
    """Positions or displacements (..., 2) in cells of a (h, w) grid -> pixels of the (H, W) image it covers."""
    x, y = cells.unbind(-1)
    return torch.stack([x * (image[1] / grid[1]), y * (image[0] / grid[0])], dim=-1)


def points_to_flow(points: Tensor, grid: Size, image: Size) -> Tensor:
    """The flow of a grid whose cells were matched to given points.

    Args:
        points: (B, h*w, 2) matched target positions, in pixels of the (H, W) network image.
        grid: (h, w) of the source grid.
        image: (H, W).

    Returns:
        (B, 2, h, w).
    """
    centres = cell_centres(grid, image, points.device, points.dtype)
    return (points - centres).transpose(1, 2).unflatten(2, grid)


def pseudo_flow(
    src_kps: Tensor, trg_kps: Tensor, mask: Tensor, grid: Size, image: Size, radius: float
) -> tuple[Tensor, Tensor]:
    """Ground-truth flow around keypoints: each keypoint lends its displacement to the cells near it.

    A keypoint covers the cells whose centre (rounded down, as CATs' integer grid has it) lies within `radius` on both
    axes. Where several keypoints cover a cell, its flow is the last one's target less the mean of all their sources:
    this is what CATs, ACTR and LPMFlow train on (their receptive field of 35 at 512 px is `radius=17`). With one
    covering keypoint it is ViTSC's eq. 5, F = q - p.

    Args:
        src_kps: (B, K, 2) source keypoints, in pixels of the network image.
        trg_kps: (B, K, 2) target keypoints.
        mask: (B, K) bool, which keypoints count.
        grid: (h, w) of the flow.
        image: (H, W) of the network image.
        radius: Half the side of the square that a keypoint covers, in pixels of the network image.

    Returns:
        Flow (B, 2, h, w) in pixels of the network image, zero where no keypoint reaches, and the covered cells
        (B, h, w) bool.
    """
    centres = cell_centres(grid, image, src_kps.device, src_kps.dtype).floor()
    near = (src_kps.unsqueeze(2) - centres).abs().amax(-1) <= radius  # (B, K, h*w)
    near = near & mask.unsqueeze(-1)
    covered = near.any(1)
    weight = near.to(src_kps.dtype)
    mean_src = torch.einsum("bkn,bkc->bnc", weight, src_kps) / weight.sum(1).clamp(min=1).unsqueeze(-1)
    order = torch.arange(1, near.shape[1] + 1, device=near.device).view(1, -1, 1)
    last = (near * order).argmax(1)  # (B, h*w), the highest covering index
    flow = torch.gather(trg_kps, 1, last.unsqueeze(-1).expand(-1, -1, 2)) - mean_src
    flow = torch.where(covered.unsqueeze(-1), flow, torch.zeros((), dtype=flow.dtype, device=flow.device))
    return flow.transpose(1, 2).unflatten(2, grid), covered.unflatten(1, grid)


def bilinear_cells(points: Tensor, grid: Size, image: Size) -> tuple[Tensor, Tensor]:
    """The four cells whose centres surround each point, and their bilinear weights: what `sample` reads.

    Args:
        points: (B, n, 2) in pixels of the (H, W) network image.
        grid: (h, w).
        image: (H, W).

    Returns:
        Row-major cell indices (B, n, 4) int64 and weights (B, n, 4) that sum to one.
    """
    (h, w), (H, W) = grid, image
    limit = points.new_tensor([w - 1, h - 1])
    at = points * points.new_tensor([w / W, h / H]) - 0.5  # cell c's centre is at c
    at = torch.minimum(at.clamp(min=0), limit)
    low = torch.minimum(at.floor(), (limit - 1).clamp(min=0))
    high = torch.minimum(low + 1, limit)
    share = at - low
    x, y = torch.stack([low, high], -1).unbind(2)  # (B, n, 2) each
    wx, wy = torch.stack([1 - share, share], -1).unbind(2)
    cells = (y.unsqueeze(-1) * w + x.unsqueeze(-2)).flatten(2).long()
    return cells, (wy.unsqueeze(-1) * wx.unsqueeze(-2)).flatten(2)
