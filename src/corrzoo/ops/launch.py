"""Launching the kernels: the twin of `streaming`, on CUDA tensors (or any, where Triton's interpreter is on).

Scores are never in memory: forwards leave sums for each row and split of the columns, backwards a strip of score
gradients (64 MB at most) that two GEMMs turn into feature gradients.
"""

import itertools
import math
import os

import torch
import triton
from torch import Tensor

from corrzoo.ops import kernels
from corrzoo.ops.reference import Matches, Mutual, inverse_norm
from corrzoo.ops.streaming import Grads, Piece, Window, across_, pieces

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KINDS = {"none": 0, "argmax": 1, "given": 1, "crop": 2}
STRIP = 64 * 2**20
"""Bytes of score gradients that a backward holds at a time."""


def tiles(dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Sizes of a program, such that no kernel spills registers (tests/ops/test_compiled.py counts them)."""
    if dtype == torch.float32:
        stages = 3 if capability >= 10 else 2
        return {"TILE_N": 64, "TILE_M": 128, "TILE_C": 32, "num_warps": 8, "num_stages": stages}
    rows = 128 if capability == 9 else 64  # on sm_100, triton 3.8 spills in `maxima` at 128 rows
    return {"TILE_N": rows, "TILE_M": 128, "TILE_C": 64, "num_warps": 8, "num_stages": 3}


class _Problem:
    """What every kernel on src (B, N, C) and trg (B, M, C) is launched with."""

    def __init__(self, src: Tensor, trg: Tensor, normalize: bool) -> None:
        self.src, self.trg = src, trg
        self.norms = [inverse_norm(x) if normalize else x for x in (src, trg)]  # the kernels read them if NORMALIZE
        self.tiles = tiles(src.dtype, torch.cuda.get_device_capability(src.device)[0] if src.is_cuda else 9)
        self.sizes = (src.shape[1], trg.shape[1], src.shape[2])
        self.strides = (*src.stride(), *trg.stride())
        tf32 = src.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        precision = "tf32" if tf32 else "ieee"
        self.options = {**self.tiles, "NORMALIZE": normalize, "PRECISION": precision, "UPCAST": INTERPRETED}

    def across(self, grad: Tensor, side: int, at: Piece) -> Tensor:
        """Feature gradients of a piece of src (0) or trg (1), where asked without their part along the features."""
        if self.options["NORMALIZE"]:
            across_(grad, (self.src, self.trg)[side][at], self.norms[side][at].unsqueeze(-1))
        return grad

    def splits(self) -> tuple[int, int, int]:
        """(row tiles, splits of the columns, columns in a split): enough programs to fill the processors twice."""
        processors = torch.cuda.get_device_properties(self.src.device).multi_processor_count if self.src.is_cuda else 4
        rows, cols = (math.ceil(n / self.tiles[t]) for n, t in zip(self.sizes, ("TILE_N", "TILE_M"), strict=False))
        wanted = max(1, min(cols, math.ceil(2 * processors / (rows * self.src.shape[0]))))
        span = math.ceil(cols / wanted)
        return rows, math.ceil(cols / span), span * self.tiles["TILE_M"]


def _extent(window: Window) -> float:
    return float(window.radius) if window.kind == "crop" else math.log2(math.e) / (2 * window.sigma**2 or 1.0)


def _centre(window: Window, centre: Tensor | None, argmax: Tensor) -> Tensor:
    """(B, N, 2) float32 centre of the window; the plain soft-argmax has none, and does not look."""
    if window.kind == "given" and centre is not None:
        return centre.contiguous()
    return torch.stack([argmax % window.grid[1], argmax // window.grid[1]], dim=-1) + 0.5


def _best(best: Tensor, at: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The first maximum over pieces in order; the kernels' infinity stands for NaN."""
    best, piece = best.max(dim=dim)
    at = at.gather(dim, piece.unsqueeze(dim)).squeeze(dim).long()
    return torch.where(best == torch.inf, torch.nan, best), at


def _maxima(problem: _Problem, columns: bool) -> Mutual:
    src, trg = problem.src, problem.trg
    B, (N, M, _) = src.shape[0], problem.sizes
    rows, splits, span = problem.splits()
    row_best, row_at = _pair(src, B, N, splits)
    col_best, col_at = _pair(src, B, rows if columns else 0, M)
    kernels.maxima[(rows, splits, B)](
        src, trg, *problem.norms, row_best, row_at, col_best, col_at, *problem.sizes, *problem.strides, span,
        COLUMNS=columns, **problem.options,
    )  # fmt: skip
    return Mutual(*_best(row_best, row_at, 2), *(_best(col_best, col_at, 1) if columns else (col_best, col_at)))


def _pair(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.int32)


def mutual(src: Tensor, trg: Tensor, normalize: bool) -> Mutual:
    """`corrzoo.ops.mutual` without a gradient."""
    return _maxima(_Problem(src, trg, normalize), columns=True)


def match(
    src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor | None, window: Window, normalize: bool, keep: int
) -> tuple[Matches, Tensor]:
    """`streaming.match`, except that nothing is kept."""
    problem = _Problem(src, trg, normalize)
    around_best = window.kind in ("argmax", "crop")
    if around_best:
        best, argmax, *_ = _maxima(problem, columns=False)
        centre = _centre(window, None, argmax)
    rows, splits, span = problem.splits()
    B, N, _ = src.shape
    sums, (_, at) = src.new_empty((6, B, N, splits), dtype=torch.float32), _pair(src, B, N, splits)
    kernels.expectation[(rows, splits, B)](
        src, trg, *problem.norms, temperature, src if centre is None else centre.contiguous(), sums, at,
        *problem.sizes, window.grid[1], *problem.strides, span, sums.stride(0), _extent(window),
        KIND=KINDS[window.kind], BEST=not around_best, **problem.options,
    )  # fmt: skip
    if not around_best:
        best, argmax = _best(sums[5], at, 2)
    top = sums[0].amax(-1, keepdim=True)
    mass, x, y, logits = (sums[1:5] * torch.exp2(sums[0] - top)).sum(-1)
    lse = (top.squeeze(-1) + mass.log2()) * math.log(2)
    xy = torch.stack([x, y], dim=-1) / mass.unsqueeze(-1)
    return Matches(xy, best, argmax, lse, lse - logits / mass * math.log(2)), sums.new_empty(B, keep, trg.shape[1])


def match_backward(
    grads: Grads, src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor | None, matches: Matches, kept: Tensor,
    window: Window, normalize: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`streaming.match_backward`, without its kept logits."""
    problem = _Problem(src, trg, normalize)
    B, (N, M, _) = src.shape[0], problem.sizes
    centre, wants_moments = _centre(window, centre, matches.argmax), needs[2] or needs[3]
    rows_in = _rows_in(grads, matches, centre)
    # Score gradients fall below what float16 can hold.
    dtype = torch.float32 if src.dtype == torch.float16 else src.dtype
    dsrc, dtrg = (torch.empty_like(x) if need else x.new_empty(0) for x, need in zip((src, trg), needs, strict=False))
    moments = src.new_zeros(3, B, N, dtype=torch.float32)
    columns = math.ceil(M / problem.tiles["TILE_M"])
    for _, strips in itertools.groupby(pieces(B, range(N), M, STRIP // dtype.itemsize), lambda at: at[0].start):
        into_trg: Tensor | float = 0.0
        for items, points in strips:
            b, r = items.stop - items.start, points.stop - points.start
            out = src.new_empty(b, r, M, dtype=dtype)
            sums = src.new_empty((3, b, r, 4 * columns) if wants_moments else (0, 0), dtype=torch.float32)
            kernels.score_gradients[(columns, math.ceil(r / problem.tiles["TILE_N"]), b)](
                src[items], trg[items], *(n[items] for n in problem.norms), temperature, centre[items],
                matches.argmax[items], rows_in[:, items], out, sums, points.start, r, *problem.sizes, window.grid[1],
                *problem.strides, B * N, sums.stride(0), _extent(window),
                KIND=KINDS[window.kind], MOMENTS=wants_moments, **problem.options,
            )  # fmt: skip
            if wants_moments:
                moments[:, items, points] = sums.sum(-1)
            if needs[0]:
                dsrc[items, points] = problem.across(_bmm(out, trg[items].to(dtype)), 0, (items, points))
            if needs[1]:
                into_trg += _bmm(out.mT, src[items, points].to(dtype))
        if isinstance(into_trg, Tensor):
            dtrg[items] = problem.across(into_trg, 1, (items, slice(None)))
    dtemperature = -moments[0].sum() / temperature if needs[2] else moments.new_empty(0)
    dcentre = moments[1:].movedim(0, -1) / window.sigma**2 if needs[3] else moments.new_empty(0)
    return dsrc, dtrg, dtemperature, dcentre


def _rows_in(grads: Grads, matches: Matches, centre: Tensor) -> Tensor:
    """(6, B, N): what `kernels.score_gradients` needs of every row, positions as seen from the window's centre."""
    zero = torch.zeros_like(matches.lse)
    slopes = torch.zeros_like(matches.xy) if grads.xy is None else grads.xy.float()
    dmax, dlse, dentropy = (zero if g is None else g.float() for g in grads[1:])
    # dz_j / p_j = <dxy, v_j - xy> + dlse - dentropy (z_j - lse + entropy), here for z in units of log 2
    offset = dlse + dentropy * (matches.lse - matches.entropy) - (slopes * (matches.xy - centre)).sum(-1)
    factors = torch.stack([slopes[..., 0], slopes[..., 1], dentropy * math.log(2), offset]) * math.log(2)
    return torch.cat([factors, (matches.lse / math.log(2)).unsqueeze(0), dmax.unsqueeze(0)])


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def patch_options(side: int) -> dict[str, int]:
    """Tile sizes of the patch kernels: the more cells a patch has, the fewer channels are read at a time."""
    cells = triton.next_power_of_2(side * side)
    return {"SIDE": side, "CELLS": cells, "TILE_C": max(16, min(64, 2048 // cells)), "num_warps": 4}


def patch_scores(src: Tensor, trg: Tensor, corner: Tensor, side: int) -> Tensor:
    """`streaming.patch_scores`."""
    B, N, C = src.shape
    out = src.new_empty(B, N, side**2)
    kernels.patch_scores[(N, B)](
        src.contiguous(), trg.contiguous(), corner.contiguous(), out, N, C, *trg.shape[1:3], **patch_options(side)
    )
    return out


def patch_scores_backward(grad: Tensor, src: Tensor, trg: Tensor, corner: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """`streaming.patch_scores_backward`."""
    B, N, C = src.shape
    dsrc, dtrg = src.new_empty(src.shape), trg.new_zeros(trg.shape)
    kernels.patch_gradients[(N, B)](
        grad.contiguous(), src.contiguous(), trg.contiguous(), corner.contiguous(), dsrc, dtrg,
        N, C, *trg.shape[1:3], **patch_options(side),
    )  # fmt: skip
    return dsrc, dtrg
