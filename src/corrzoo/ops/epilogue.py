"""The row-wise epilogue in torch, for any device: products of features to positions, and back to their gradients.

With products <f_i, g_j>, a_i = 1 / |f_i|, b_j = 1 / |g_j| and a window w_ij, the softmax is over the logits
z_ij = w_ij a_i b_j <f_i, g_j> log2(e) / T to base 2: exp2 stays fast where exp yields subnormal numbers. Windows are
products over x and y, and so are the means of x and y: passes work on the rows and columns of the target grid. They go
over chunks that fit a core's cache, most of them in place, and so cost little next to the GEMM.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from corrzoo.geometry import Size
from corrzoo.ops.reference import OUTSIDE, inverse_norm
from corrzoo.precision import full

LOG2E = math.log2(math.e)
CHUNK = {"cpu": 2**18}
"""Elements that a pass goes over, by device: 1 MB of float32 on a CPU. On other devices it is a whole strip."""
Piece = tuple[slice, slice]
"""Items of the batch and points: several whole items, or some points of one."""


class Rows(NamedTuple):
    """The results of all rows of a batch, which the epilogue writes, and the options that it reads."""

    kind: str
    """A position by the window "none", "argmax" or "crop"; or "square": the scores of a square of cells."""
    grid: Size
    extent: float
    """In cells: standard deviation of "argmax", radius of "crop", side of "square"."""
    temperature: Tensor  # ()
    corner: Tensor | None
    """(B, N, 2) int64 (x, y) of the top left cell of "square"."""
    values: Tensor
    """Positions (B, N, 2) in cells, or scores (B, N, side²)."""
    argmax: Tensor  # (B, N) int64
    lse: Tensor  # (B, N), log2 of sum_j 2^z_ij, from which the backward computes the probabilities again
    a: Tensor  # (B, N), ones if features are not normalised
    b: Tensor  # (B, M)


def inverse_norms(src: Tensor, trg: Tensor, rows: Rows) -> None:
    """Write a and b."""
    rows.a.copy_(inverse_norm(src))
    rows.b.copy_(inverse_norm(trg))


def read_out(block: Tensor, at: Piece, rows: Rows) -> None:
    """Reduce the products (b, r, M) of the points `at`. For a position they become logits, in place."""
    if rows.kind == "square":
        cells, scales = _square(at, rows)
        rows.values[at] = block.gather(2, cells) * scales
        return
    z, (x, y) = block.mul_(_column(at, rows)), _axes(rows)
    best, rows.argmax[at] = row_maxima(z)
    _logits_(z, rows, *_window(at, rows))
    top = z.amax(-1) if rows.kind == "argmax" else best * rows.a[at]
    p = torch.sub(z, top.unsqueeze(-1)).exp2_().unflatten(-1, rows.grid)
    along_x, along_y = p.sum(2), p.sum(3)  # (b, r, w), (b, r, h)
    mass = along_x.sum(-1)
    rows.values[at] = torch.stack([along_x @ x, along_y @ y], dim=-1) / mass.unsqueeze(-1)
    rows.lse[at] = top + mass.log2()


def score_gradients(
    block: Tensor, at: Piece, rows: Rows, grad: Tensor, out: Tensor, known: bool, temperature: bool
) -> Tensor | None:
    """Write the gradients of the products (b, r, M) to `out`; if `temperature`, return -T dL/dT, summed over the rows.

    `block` has logits if `known`, else products, and may then be `out`. With v_j the centre of cell j, the gradient of
    a logit is p_j <dxy, v_j - xy>.
    """
    if rows.kind == "square":
        cells, scales = _square(at, rows)
        out.zero_().scatter_add_(2, cells, (grad[at] * scales).to(out.dtype))  # cells outside add 0 to one inside
        return None
    column, (x, y) = _column(at, rows), _axes(rows)
    factors, penalties = _window(at, rows)
    z = block if known else _logits_(torch.mul(block, column, out=out), rows, factors, penalties)
    log_p = torch.sub(z, rows.lse[at].unsqueeze(-1))
    mean, slope = rows.values[at].unsqueeze(-2), grad[at].unsqueeze(-2) / LOG2E  # (b, r, 1, 2)
    along_x, along_y = (x - mean[..., 0]) * slope[..., 0], (y - mean[..., 1]) * slope[..., 1]
    d = torch.add(along_x.unsqueeze(2), along_y.unsqueeze(3)).flatten(2).mul_(log_p.exp2())
    moment = None
    if temperature:  # a row of d adds up to 0 but for rounding, which counts least if the best cell's log p is 0
        log_p -= log_p.gather(2, rows.argmax[at].unsqueeze(-1))
        moment = torch.dot(d.flatten(), log_p.flatten())
    for factor in factors:
        d.unflatten(-1, rows.grid).mul_(factor)
    torch.mul(d, column, out=out)
    return moment


def across(grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Remove from a gradient (B, n, C) the part along each feature, which changes only its norm, in place."""
    along = torch.einsum("bnc,bnc->bn", full(x), grad) * scale.square()
    return grad.addcmul_(full(x), along.unsqueeze(-1), value=-1)


def row_maxima(x: Tensor) -> tuple[Tensor, Tensor]:
    """x.max(-1) of (b, r, M). On a CPU maxima of blocks come first: without indices they are vectorised."""
    if x.shape[-1] % 64 or x.is_cuda:
        best, at = x.max(dim=-1)
        return best, at
    blocks = x.unflatten(-1, (-1, 64))
    best, first = blocks.amax(-1).max(dim=-1)
    within = blocks.take_along_dim(first[..., None, None], dim=2).squeeze(2).argmax(-1)
    return best, first * 64 + within


def _column(at: Piece, rows: Rows) -> Tensor:
    """(b, 1, M): what all products of a cell are multiplied by."""
    return rows.b[at[0]].unsqueeze(1) * (LOG2E / rows.temperature)


def _axes(rows: Rows) -> tuple[Tensor, Tensor]:
    """x (w,) and y (h,) of the cells' centres."""
    y, x = (torch.arange(n, device=rows.lse.device, dtype=rows.lse.dtype) + 0.5 for n in rows.grid)
    return x, y


def _window(at: Piece, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Factors and penalties, broadcast over (b, r, h, w), of the row and of its window."""
    (x, y), argmax, a, w = _axes(rows), rows.argmax[at], rows.a[at][..., None, None], rows.grid[1]
    if rows.kind == "none":
        return [a], []
    dx, dy = (x - x[argmax % w].unsqueeze(-1)).unsqueeze(2), (y - y[argmax // w].unsqueeze(-1)).unsqueeze(3)
    if rows.kind == "crop":
        return [a], [OUTSIDE * (d.abs() > rows.extent).to(d.dtype) for d in (dx, dy)]
    wx, wy = (torch.exp(d.square() / (-2 * rows.extent**2)) for d in (dx, dy))
    return [wx * a, wy], []


def _logits_(z: Tensor, rows: Rows, factors: list[Tensor], penalties: list[Tensor]) -> Tensor:
    """Apply factors and penalties to (b, r, M), in place."""
    grid = z.unflatten(-1, rows.grid)
    for factor in factors:
        grid.mul_(factor)
    for penalty in penalties:
        grid.add_(penalty)
    return z


def _square(at: Piece, rows: Rows) -> tuple[Tensor, Tensor]:
    """Cells (b, r, side²) of squares, clipped to the target, and the factors of their products: 0 outside of it."""
    assert rows.corner is not None
    (h, w), corner = rows.grid, rows.corner[at].unsqueeze(-2)  # (b, r, 1, 2)
    x, y = (corner + torch.arange(int(rows.extent), device=corner.device).unsqueeze(-1)).unbind(-1)  # (b, r, side) each
    inside = ((x >= 0) & (x < w)).unsqueeze(-2) & ((y >= 0) & (y < h)).unsqueeze(-1)
    cells = (y.clamp(0, h - 1).unsqueeze(-1) * w + x.clamp(0, w - 1).unsqueeze(-2)).flatten(2)
    b = rows.b[at[0]].gather(1, cells.flatten(1)).view_as(cells)
    return cells, inside.flatten(2) * rows.a[at].unsqueeze(-1) * b
