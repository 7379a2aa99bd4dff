"""The coordinate convention, and every conversion that follows from it.

Points are continuous (x, y) with the origin at the image's top-left corner. Pixel i covers [i, i + 1), so:

- resizing an image from (w, h) to (W, H) moves a point to (x * W / w, y * H / h);
- cell c of a feature grid with stride s has its centre at (c + 0.5) * s;
- reading a map between cell centres is `grid_sample(..., align_corners=False)`;
- mirroring a W pixels wide image moves x to W - x.

A flow (B, 2, h, w) holds, for each cell of the source grid, the displacement (dx, dy) from the cell's centre to its
match, in pixels of the network image. A head whose authors use another grid converts at its own border.

Sizes are Python numbers here, and no function makes a tensor of them: on a GPU that copy would wait for all work.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.errors import ZooError
from corrzoo.precision import full, full_precision

Size = tuple[int, int]
"""(height, width), as tensors are laid out; an image's *original* size in a Record or Pair is (w, h)."""


def size_of(maps: Tensor) -> Size:
    """(h, w) of maps or images (..., h, w)."""
    return maps.shape[-2], maps.shape[-1]


def cell_centres(
    grid: Size, image: Size, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(h*w, 2) centres of the cells of a (h, w) grid over a (H, W) image, row by row, in pixels."""
    (h, w), (H, W) = grid, image
    y = (torch.arange(h, device=device, dtype=dtype) + 0.5) * (H / h)
    x = (torch.arange(w, device=device, dtype=dtype) + 0.5) * (W / w)
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([xx, yy], dim=-1).reshape(h * w, 2)


def resize_points(points: Tensor, old: tuple[int, int] | Tensor, new: tuple[int, int] | Tensor) -> Tensor:
    """Points (..., n, 2) of an image of size `old`, in the same image at size `new`: (w, h), or tensors (..., 2)."""
    (w, h), (W, H) = _sides(old), _sides(new)
    x, y = points.unbind(-1)
    return torch.stack([x * (W / w), y * (H / h)], dim=-1)


def _sides(size: tuple[int, int] | Tensor) -> tuple[int | Tensor, ...]:
    """Width and height: numbers, or (..., 1) each for a tensor (..., 2)."""
    return size.unsqueeze(-2).unbind(-1) if isinstance(size, Tensor) else size


def mirror_points(points: Tensor, width: int) -> Tensor:
    """Points (..., 2) of an image of that width in pixels, in its mirror image."""
    x, y = points.unbind(-1)
    return torch.stack([width - x, y], dim=-1)


def cells_to_pixels(cells: Tensor, grid: Size, image: Size) -> Tensor:
    """Positions or displacements (..., 2) in cells of a (h, w) grid -> pixels of the (H, W) image it covers."""
    return resize_points(cells, grid[::-1], image[::-1])


def pixels_to_cells(points: Tensor, grid: Size, image: Size) -> Tensor:
    """Points (..., 2) in pixels of a (H, W) image -> continuous cells of the (h, w) grid that covers it."""
    return cells_to_pixels(points, image, grid)


def sample(maps: Tensor, points: Tensor, image: Size) -> Tensor:
    """Read maps (B, C, h, w) that cover a (H, W) image at points (B, n, 2), bilinearly: (B, n, C).

    Outside the outermost cell centres the border's value holds: a flow has no reason to fall to zero there.
    """
    x, y = points.unbind(-1)
    grid = torch.stack([2 * x / image[1] - 1, 2 * y / image[0] - 1], dim=-1)  # (B, n, 2) in [-1, 1]
    wide = full(maps)  # bfloat16 would round the points by up to 0.3 px of 320
    grid = grid.unsqueeze(1).to(wide.dtype)
    out = F.grid_sample(wide, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.to(maps.dtype).squeeze(2).transpose(1, 2)


def cosine_maps(src: Tensor, trg: Tensor, points: Tensor, image: Size) -> Tensor:
    """Cosines (B, n, h, w) of source features (B, C, h', w') at points (B, n, 2) with target features (B, C, h, w)."""
    with full_precision(src):
        rows = F.normalize(sample(full(src), points, image), dim=2)
        return torch.einsum("bnc,bchw->bnhw", rows, F.normalize(full(trg), dim=1))


def transfer(points: Tensor, flow: Tensor, image: Size) -> Tensor:
    """Source points (B, n, 2) displaced by a flow (B, 2, h, w), in pixels of the (H, W) network image."""
    return points + sample(flow, points, image).to(points.dtype)


def points_to_flow(points: Tensor, grid: Size, image: Size) -> Tensor:
    """Flow (B, 2, h, w) of a source grid (h, w) whose cells match target points (B, h*w, 2), in pixels."""
    centres = cell_centres(grid, image, points.device, points.dtype)
    return (points - centres).transpose(1, 2).unflatten(2, grid)


def pseudo_flow(
    src_kps: Tensor, trg_kps: Tensor, mask: Tensor, grid: Size, image: Size, radius: float
) -> tuple[Tensor, Tensor]:
    """Ground-truth flow around keypoints: the cells near a keypoint take its displacement.

    A keypoint covers the cells whose centre (rounded down, as on CATs' integer grid) lies within `radius` pixels on
    both axes. Where several keypoints cover a cell, its flow is the last one's target minus the mean of their
    sources. CATs, ACTR and LPMFlow train on this flow: their receptive field of 35 is `radius=17`, in images of 256 px
    (CATs) or 512 px. With one covering keypoint it is ViTSC's eq. 5, F = q - p.

    Args:
        src_kps: (B, K, 2) in pixels of the network image, as `trg_kps`.
        mask: (B, K) bool, which rows are keypoints.

    Returns:
        Flow (B, 2, h, w) in pixels of the network image, zero in cells that no keypoint covers; and which cells are
        covered, (B, h, w) bool.

    Raises:
        ZooError: if K = 0, as in warps of one image.
    """
    check_keypoints(src_kps)
    centres = cell_centres(grid, image, src_kps.device, src_kps.dtype).floor()
    near = (src_kps.unsqueeze(2) - centres).abs().amax(-1) <= radius  # (B, K, h*w)
    near = near & mask.unsqueeze(-1)
    covered = near.any(1)  # (B, h*w)
    weight = near.to(src_kps.dtype)
    with full_precision(src_kps):  # bfloat16 would round the target by up to 1 px of 512
        mean_src = torch.einsum("bkn,bkc->bnc", weight, src_kps) / weight.sum(1).clamp(min=1).unsqueeze(-1)
    order = torch.arange(1, near.shape[1] + 1, device=near.device).view(1, -1, 1)
    last = (near * order).argmax(1)  # (B, h*w), the highest covering index
    flow = trg_kps.take_along_dim(last.unsqueeze(-1), 1) - mean_src
    flow = flow.masked_fill(~covered.unsqueeze(-1), 0)
    return flow.transpose(1, 2).unflatten(2, grid), covered.unflatten(1, grid)


def check_keypoints(kps: Tensor) -> None:
    """Refuse keypoints (B, K, 2) with K = 0, for a loss that needs them."""
    if not kps.shape[1]:
        raise ZooError("the training pairs have no keypoints, which the loss needs: choose another data.train")


def bilinear_cells(points: Tensor, grid: Size, image: Size) -> tuple[Tensor, Tensor]:
    """The four cells whose centres surround each point (B, n, 2), and their bilinear weights: what `sample` reads.

    Returns:
        Row-major cell indices (B, n, 4) int64, and weights (B, n, 4) that sum to one.
    """
    x, y = pixels_to_cells(points, grid, image).unbind(-1)
    columns, x_weights = _neighbours(x, grid[1])  # (B, n, 2) each
    rows, y_weights = _neighbours(y, grid[0])
    cells = (rows.unsqueeze(-1) * grid[1] + columns.unsqueeze(-2)).flatten(2).long()
    return cells, (y_weights.unsqueeze(-1) * x_weights.unsqueeze(-2)).flatten(2)


def _neighbours(position: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """The two cells of a row of `cells` around continuous positions (B, n), and their linear weights: (B, n, 2)."""
    at = (position - 0.5).clamp(0, cells - 1)  # the centre of cell c is at c
    low = at.floor().clamp(max=max(cells - 2, 0))
    high = (low + 1).clamp(max=cells - 1)
    return torch.stack([low, high], -1), torch.stack([1 - (at - low), at - low], -1)
