# mypy: disallow-untyped-defs=False
"""The row-wise epilogue in Triton, for CUDA: the twin of `epilogue`, which says what is computed.

A program takes R rows of a strip and reads them once; for positions twice, if a row has more than ONCE cells.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrzoo.ops.epilogue import Piece, Rows

ONCE, TILE = 16384, 4096
"""Cells of a row that stays in registers, and of a tile of a longer row."""
ELEMENTS, PER_THREAD = 1024, 32
"""Elements of a program at least (by several rows, where rows are short), and of a thread at most."""
FEATURES = {"R": 16, "TILE_C": 128, "num_warps": 4}
"""Tiles of the kernels that go over features."""
KINDS = {"none": 0, "argmax": 1, "crop": 2}
GAUSSIAN, CROP = tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(2147483647)


@triton.jit
def _program(tiles):
    """This program's item of the batch, and its tile of that item: one axis, as the others end at 65,535 programs."""
    item = tl.program_id(0) // tiles
    return item.to(tl.int64), tl.program_id(0) - item * tiles


@triton.jit
def _rows(first_item, first_point, rows, N, a, temperature, R: tl.constexpr):
    """This program's item of the strip, its rows, which of them exist, their points, and scales a log2(e) / T."""
    item, tile = _program(tl.cdiv(rows, R))
    row = tile * R + tl.arange(0, R)
    real = row < rows
    point = (first_item + item) * N + first_point + row
    scale = LOG2E / tl.load(temperature) * tl.load(a + point, mask=real, other=0.0)
    return item, row.to(tl.int64), real, point, scale


@triton.jit
def _largest(x, y):
    """The larger, or NaN if one is NaN, which `tl.max` leaves out."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _products(block, b, k, real, M, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Products (R, SIZE) times b of the k-th tile of rows at `block` (R, 1), the cells, which exist, and their b.

    EXACT: all of them exist.
    """
    cell = k * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (cell >= 0) if EXACT else (cell < M)
    b = tl.load(b + cell, mask=inside, other=0.0)
    return tl.load(block + cell, mask=inside & real[:, None], other=0.0) * b, cell, inside, b


@triton.jit
def _window(scale, at, cell, inside, extent, KIND: tl.constexpr, W: tl.constexpr):
    """Factors of the scores of rows with a window around cells `at` (R,), and the cells that have weight."""
    factor = scale[:, None]
    if KIND != 0:
        dx, dy = (cell % W - (at % W)[:, None]).to(tl.float32), (cell // W - (at // W)[:, None]).to(tl.float32)
        if KIND == GAUSSIAN:
            factor = factor * tl.exp2(dx * dx * extent + dy * dy * extent)
        if KIND == CROP:
            inside = inside & (tl.abs(dx) <= extent) & (tl.abs(dy) <= extent)
    return factor, inside


@triton.jit(do_not_specialize=["first_item", "first_point", "rows"])
def positions(
    block, a, b, temperature, xy, argmax, lse, first_item, first_point, rows, N, M, stride, extent,
    KIND: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`epilogue.read_out` of R rows; `extent` is -log2(e) / (2 sigma²) or the radius."""
    item, row, real, point, scale = _rows(first_item, first_point, rows, N, a, temperature, R)
    block += item * stride + row[:, None] * M
    b += (first_item + item) * M
    top, at = tl.full((R,), float("-inf"), tl.float32), tl.full((R,), 0, tl.int32)
    t = tl.zeros((R, SIZE), tl.float32)
    for k in range(TILES):
        t, cell, inside, _ = _products(block, b, k, real, M, SIZE, EXACT)
        if not EXACT:
            t = tl.where(inside, t, float("-inf"))
        best = tl.reduce(t, 1, _largest)
        best = tl.where(best == best, best, float("inf"))  # as torch's, the first NaN is the maximum: it is not below
        first = tl.min(tl.where(t < best[:, None], NOWHERE, cell), axis=1)
        at, top = tl.where(best > top, first, at), tl.maximum(best, top)
    high = tl.full((R,), float("-inf"), tl.float32) if KIND == GAUSSIAN else top * scale
    mass, sum_x, sum_y = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for k in range(TILES):
        cell = k * SIZE + tl.arange(0, SIZE)[None, :]
        inside = cell < M
        if TILES > 1:  # else the row is in registers
            t, cell, inside, _ = _products(block, b, k, real, M, SIZE, EXACT)
        factor, counted = _window(scale, at, cell, inside, extent, KIND, W)
        z = t * factor
        if KIND == CROP or not EXACT:
            z = tl.where(counted, z, float("-inf"))
        if KIND == GAUSSIAN:  # else the maximum is known
            old, high = high, tl.maximum(high, tl.max(z, axis=1))
            old = tl.exp2(old - high)
            mass, sum_x, sum_y = mass * old, sum_x * old, sum_y * old
        e = tl.exp2(z - high[:, None])
        mass += tl.sum(e, axis=1)
        sum_x += tl.sum(e * (cell % W).to(tl.float32), axis=1)
        sum_y += tl.sum(e * (cell // W).to(tl.float32), axis=1)
    tl.store(xy + 2 * point, sum_x / mass + 0.5, mask=real)
    tl.store(xy + 2 * point + 1, sum_y / mass + 0.5, mask=real)
    tl.store(argmax + point, at.to(tl.int64), mask=real)
    tl.store(lse + point, high + tl.log2(mass), mask=real)


@triton.jit(do_not_specialize=["first_item", "first_point", "rows"])
def product_gradients(
    block, out, a, b, temperature, xy, argmax, lse, dxy, moments,
    first_item, first_point, rows, N, M, stride, extent, MOMENTS: tl.constexpr,
    KIND: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`epilogue.score_gradients` of R rows, to `out` (b, r, M), which may be `block`; parts of -T dT to `moments`."""
    item, row, real, point, scale = _rows(first_item, first_point, rows, N, a, temperature, R)
    block += item * stride + row[:, None] * M
    out += (item * rows + row[:, None]) * M
    b += (first_item + item) * M
    at = tl.load(argmax + point, mask=real, other=0).to(tl.int32)
    shift = tl.load(lse + point, mask=real, other=0.0)[:, None]
    slope_x = tl.load(dxy + 2 * point, mask=real, other=0.0)[:, None] / LOG2E
    slope_y = tl.load(dxy + 2 * point + 1, mask=real, other=0.0)[:, None] / LOG2E
    mean_x = tl.load(xy + 2 * point, mask=real, other=0.0)[:, None] - 0.5
    mean_y = tl.load(xy + 2 * point + 1, mask=real, other=0.0)[:, None] - 0.5
    moment, total, best = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for k in range(TILES):
        t, cell, inside, column = _products(block, b, k, real, M, SIZE, EXACT)
        factor, counted = _window(scale, at, cell, inside, extent, KIND, W)
        log_p = t * factor - shift
        d = ((cell % W).to(tl.float32) - mean_x) * slope_x + ((cell // W).to(tl.float32) - mean_y) * slope_y
        d = tl.exp2(log_p) * d
        if KIND == CROP or not EXACT:
            d = tl.where(counted, d, 0.0)
        if MOMENTS:
            moment += tl.sum(d * log_p, axis=1)
            total += tl.sum(d, axis=1)
            best += tl.sum(tl.where(cell == at[:, None], log_p, 0.0), axis=1)
        tl.store(out + cell, (d * factor * column).to(out.dtype.element_ty), mask=inside & real[:, None])
    if MOMENTS:
        tl.store(moments + item * rows + row, moment - total * best, mask=real)


@triton.jit
def _channels(x, row, n, k, C, stride_n, stride_c, TILE_C: tl.constexpr):
    """Channels (R, TILE_C) of some rows of x (n, C) in float32, their indices, and whether they exist."""
    c = k * TILE_C + tl.arange(0, TILE_C)
    exist = (row < n)[:, None] & (c < C)[None, :]
    return tl.load(x + row[:, None] * stride_n + c[None, :] * stride_c, mask=exist, other=0.0).to(tl.float32), c, exist


@triton.jit
def _norm(x, out, item, tile, n, C, stride_b, stride_n, stride_c, R: tl.constexpr, TILE_C: tl.constexpr):
    row = tile * R + tl.arange(0, R)
    total = tl.zeros((R,), tl.float32)
    for k in range(tl.cdiv(C, TILE_C)):
        v, _, _ = _channels(x + item * stride_b, row, n, k, C, stride_n, stride_c, TILE_C)
        total += tl.sum(v * v, axis=1)
    inverse = tl.where(total > 0, 1 / tl.sqrt(total), 0.0)
    tl.store(out + item * n + row, tl.where(total < float("inf"), inverse, float("nan")), mask=row < n)


@triton.jit
def norms(src, trg, a, b, N, M, C, src_b, src_n, src_c, trg_b, trg_n, trg_c, R: tl.constexpr, TILE_C: tl.constexpr):
    """`epilogue.inverse_norms`: of source features in the first programs, of target features in the others."""
    tiles = tl.cdiv(N, R)
    item, tile = _program(tiles + tl.cdiv(M, R))
    if tile < tiles:
        _norm(src, a, item, tile, N, C, src_b, src_n, src_c, R, TILE_C)
    else:
        _norm(trg, b, item, tile - tiles, M, C, trg_b, trg_n, trg_c, R, TILE_C)


@triton.jit
def remove_along(
    grad, x, scale, out, n, C, stride_b, stride_n, stride_c, R: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """`epilogue.across` of R rows of one side, to `out` (B, n, C)."""
    item, tile = _program(tl.cdiv(n, R))
    row = tile * R + tl.arange(0, R)
    x, grad, out = x + item * stride_b, grad + item * n * C, out + item * n * C
    scale = tl.load(scale + item * n + row, mask=row < n, other=0.0)
    along, tiles = tl.zeros((R,), tl.float32), tl.cdiv(C, TILE_C)
    for k in range(tiles):
        v, _, _ = _channels(x, row, n, k, C, stride_n, stride_c, TILE_C)
        g, _, _ = _channels(grad, row, n, k, C, C, 1, TILE_C)
        along += tl.sum(v * g, axis=1)
    along *= scale * scale
    for k in range(tiles):
        v, _, _ = _channels(x, row, n, k, C, stride_n, stride_c, TILE_C)
        g, c, exist = _channels(grad, row, n, k, C, C, 1, TILE_C)
        tl.store(out + row[:, None] * C + c[None, :], (g - along[:, None] * v).to(out.dtype.element_ty), mask=exist)


def tile(rows: Rows, once: int = TILE) -> dict[str, int]:
    """Compile-time constants of the kernels that take rows; a row of at most `once` cells is one tile."""
    M, W = rows.grid[0] * rows.grid[1], rows.grid[1]
    size = triton.next_power_of_2(M)
    size = size if size <= once else TILE
    R, exact = max(1, ELEMENTS // size), M % size == 0
    constants = {"KIND": KINDS[rows.kind], "W": W, "TILES": triton.cdiv(M, size), "R": R, "SIZE": size, "EXACT": exact}
    per_thread = PER_THREAD if exact else PER_THREAD // 2  # masks take registers
    return constants | {"num_warps": min(16, max(1, R * size // (32 * per_thread)))}


def inverse_norms(src: Tensor, trg: Tensor, rows: Rows) -> None:
    """`epilogue.inverse_norms`."""
    (B, N, C), M = src.shape, trg.shape[1]
    tiles = triton.cdiv(N, FEATURES["R"]) + triton.cdiv(M, FEATURES["R"])
    norms[(B * tiles,)](src, trg, rows.a, rows.b, N, M, C, *src.stride(), *trg.stride(), **FEATURES)


def read_out(block: Tensor, at: Piece, rows: Rows) -> None:
    """`epilogue.read_out`, which leaves `block` as it is."""
    outputs = (rows.values, rows.argmax, rows.lse)
    _launch(positions, block, at, rows, (block, rows.a, rows.b, rows.temperature, *outputs), tile(rows, ONCE))


def score_gradients(
    block: Tensor, at: Piece, rows: Rows, grad: Tensor, out: Tensor, known: bool, temperature: bool
) -> Tensor | None:
    """`epilogue.score_gradients`, for which `block` always has products."""
    moments = block.new_empty(block.shape[:2] if temperature else 0)
    inputs = (rows.a, rows.b, rows.temperature, rows.values, rows.argmax, rows.lse, grad.contiguous())
    constants = tile(rows) | {"MOMENTS": temperature}
    _launch(product_gradients, block, at, rows, (block, out, *inputs, moments), constants)
    return moments.sum() if temperature else None


def across(grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """`epilogue.across`, in the dtype of the features."""
    out = torch.empty_like(grad, dtype=x.dtype)
    remove_along[(x.shape[0] * triton.cdiv(x.shape[1], FEATURES["R"]),)](
        grad, x, scale, out, *x.shape[1:], *x.stride(), **FEATURES
    )
    return out


def _launch(kernel, block: Tensor, at: Piece, rows: Rows, tensors: tuple[Tensor, ...], constants: dict) -> None:
    extent = rows.extent if rows.kind == "crop" else -LOG2E.value / (2 * rows.extent**2 or 1.0)
    sizes = (at[0].start, at[1].start, block.shape[1], rows.a.shape[1], block.shape[2], block.stride(0), extent)
    kernel[(block.shape[0] * triton.cdiv(block.shape[1], constants["R"]),)](*tensors, *sizes, **constants)
