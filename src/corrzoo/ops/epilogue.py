"""The row-wise epilogue in torch, for any device: products of features to positions, and back to their gradients.

With products <f_i, g_j>, a_i = 1 / |f_i|, b_j = 1 / |g_j| and a window w_ij, the softmax is over the logits
z_ij = w_ij a_i b_j <f_i, g_j> log2(e) / T to base 2: exp2 stays fast where exp yields subnormal numbers. Windows are
products over x and y, and so are the means of x and y: passes work on the rows and columns of the target grid. They go
over chunks that fit a core's cache, most of them in place, and so cost little beside the GEMM.
"""

import math
from collections.abc import Sequence
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


class Reduction(NamedTuple):
    """What a row of scores is reduced to: the options of `corrzoo.ops.match`."""

    kind: str
    """A position by the window "none", "argmax" or "crop"; or "square": the scores of a square of cells."""
    grid: Size
    extent: int | float
    """In cells: standard deviation of "argmax", radius of "crop", side of "square"."""
    temperature: Tensor | float
    corner: Tensor | None
    """(B, N, 2) int64 (x, y) of the top left cell of "square"."""


class Rows(NamedTuple):
    """What a backward needs of its forward: `values` are positions (B, N, 2) in cells, or scores (B, N, side²)."""

    values: Tensor
    argmax: Tensor  # (B, N) int64
    lse: Tensor  # (B, N), log2 of the sum of 2^z
    a: Tensor  # (B, N), ones if features are not normalised
    b: Tensor  # (B, M)


def inverse_norms(src: Tensor, trg: Tensor) -> tuple[Tensor, Tensor]:
    """a (B, N) and b (B, M)."""
    return inverse_norm(src), inverse_norm(trg)


def gradient_dtype(features: torch.dtype) -> torch.dtype:
    """The dtype of the gradients of products."""
    return torch.promote_types(features, torch.float32)


def read_out(block: Tensor, at: Piece, how: Reduction, to: Rows) -> None:
    """Reduce the products (b, r, M) of the points `at`. For a position they become logits, in place."""
    if how.kind == "square":
        cells, factors = _square(at, how, to)
        to.values[at] = block.gather(2, cells) * factors
        return
    z, (x, y) = block.mul_(_column(at, how, to)), _axes(how, block)
    best, to.argmax[at] = row_maxima(z)
    _logits_(z, how, *_window(at, how, to))
    top = z.amax(-1) if how.kind == "argmax" else best * to.a[at]
    p = torch.sub(z, top.unsqueeze(-1)).exp2_().unflatten(-1, how.grid)
    along_x, along_y = p.sum(2), p.sum(3)  # (b, r, w), (b, r, h)
    mass = along_x.sum(-1)
    to.values[at] = torch.stack([along_x @ x, along_y @ y], dim=-1) / mass.unsqueeze(-1)
    to.lse[at] = top + mass.log2()


def score_gradients(
    block: Tensor, at: Piece, how: Reduction, of: Rows, grad: Tensor, out: Tensor, known: bool, temperature: bool
) -> Tensor | None:
    """Write gradients of the products (b, r, M) to `out`; return the points' part of dT, if `temperature`.

    `block` has logits if `known`, else products, and may then be `out`. With v_j the centre of cell j, the gradient of
    a logit is p_j <dxy, v_j - xy>.
    """
    if how.kind == "square":
        cells, factors = _square(at, how, of)
        out.zero_().scatter_add_(2, cells, grad[at] * factors)
        return None
    column, (x, y), (factors, penalties) = _column(at, how, of), _axes(how, block), _window(at, how, of)
    z = block if known else _logits_(torch.mul(block, column, out=out), how, factors, penalties)
    p = torch.sub(z, of.lse[at].unsqueeze(-1)).exp2_()
    mean, slope = of.values[at].unsqueeze(-2), grad[at].unsqueeze(-2) / LOG2E  # (b, r, 1, 2)
    along_x, along_y = (x - mean[..., 0]) * slope[..., 0], (y - mean[..., 1]) * slope[..., 1]
    d = torch.add(along_x.unsqueeze(2), along_y.unsqueeze(3)).flatten(2).mul_(p)
    moment = -torch.dot(d.flatten(), z.flatten()) / how.temperature if temperature else None
    for factor in factors:
        d.unflatten(-1, how.grid).mul_(factor)
    torch.mul(d, column, out=out)
    return moment


def across(grads: Sequence[Tensor | None], features: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor | None]:
    """Remove from gradients (B, n, C) the part along each feature, which changes only its norm."""
    for grad, x, scale in zip(grads, features, norms, strict=True):
        if grad is not None:
            along = torch.einsum("bnc,bnc->bn", full(x), grad) * scale.square()
            grad.addcmul_(full(x), along.unsqueeze(-1), value=-1)
    return list(grads)


def row_maxima(x: Tensor) -> tuple[Tensor, Tensor]:
    """x.max(-1) of (b, r, M). On a CPU maxima of blocks come first: without indices they are vectorised."""
    if x.shape[-1] % 64 or x.is_cuda:
        best, at = x.max(dim=-1)
        return best, at
    blocks = x.unflatten(-1, (-1, 64))
    best, first = blocks.amax(-1).max(dim=-1)
    within = blocks.take_along_dim(first[..., None, None], dim=2).squeeze(2).argmax(-1)
    return best, first * 64 + within


def _column(at: Piece, how: Reduction, rows: Rows) -> Tensor:
    """(b, 1, M): what all products of a cell are multiplied by."""
    return rows.b[at[0]].unsqueeze(1) * (LOG2E / how.temperature)


def _axes(how: Reduction, like: Tensor) -> tuple[Tensor, Tensor]:
    """x (w,) and y (h,) of the cells' centres."""
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5 for n in how.grid)
    return x, y


def _window(at: Piece, how: Reduction, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Factors and penalties, broadcast over (b, r, h, w), of the row and of its window."""
    (x, y), argmax, a, w = _axes(how, rows.lse), rows.argmax[at], rows.a[at][..., None, None], how.grid[1]
    if how.kind == "none":
        return [a], []
    dx, dy = (x - x[argmax % w].unsqueeze(-1)).unsqueeze(2), (y - y[argmax // w].unsqueeze(-1)).unsqueeze(3)
    if how.kind == "crop":
        return [a], [OUTSIDE * (d.abs() > how.extent).to(d.dtype) for d in (dx, dy)]
    wx, wy = (torch.exp(d.square() / (-2 * how.extent**2)) for d in (dx, dy))
    return [wx * a, wy], []


def _logits_(z: Tensor, how: Reduction, factors: list[Tensor], penalties: list[Tensor]) -> Tensor:
    """Apply factors and penalties to (b, r, M), in place."""
    grid = z.unflatten(-1, how.grid)
    for factor in factors:
        grid.mul_(factor)
    for penalty in penalties:
        grid.add_(penalty)
    return z


def _square(at: Piece, how: Reduction, rows: Rows) -> tuple[Tensor, Tensor]:
    """Cells (b, r, side²) of squares, clipped to the target, and the factors of their products: 0 outside of it."""
    assert how.corner is not None
    (h, w), corner = how.grid, how.corner[at].unsqueeze(-2)  # (b, r, 1, 2)
    x, y = (corner + torch.arange(int(how.extent), device=corner.device).unsqueeze(-1)).unbind(-1)  # (b, r, side) each
    inside = ((x >= 0) & (x < w)).unsqueeze(-2) & ((y >= 0) & (y < h)).unsqueeze(-1)
    cells = (y.clamp(0, h - 1).unsqueeze(-1) * w + x.clamp(0, w - 1).unsqueeze(-2)).flatten(2)
    b = rows.b[at[0]].gather(1, cells.flatten(1)).view_as(cells)
    return cells, inside.flatten(2) * rows.a[at].unsqueeze(-1) * b
