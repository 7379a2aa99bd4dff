# mypy: disallow-untyped-defs=False
"""The row-wise epilogue in Triton, for CUDA: the twin of `epilogue`, which says what is computed.

A program takes a few rows of a strip, each as a tile (HB, WP) of the target grid, and reads them once. Grids of more
than CELLS cells take several tiles a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrzoo.ops.epilogue import Piece, Rows

CELLS, ELEMENTS, PER_THREAD = 16384, 1024, 32
"""Cells of a tile at most, elements of a program at least (by several rows, where rows are short), and of a thread."""
FEATURES = {"R": 16, "TILE_C": 128, "num_warps": 4}
"""Tiles of the kernels that go over features."""
KINDS = {"none": 0, "argmax": 1, "crop": 2}
PLAIN, GAUSSIAN, CROP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(2147483647)


@triton.jit
def _tile(k, h, w, FULL: tl.constexpr, HB: tl.constexpr, WP: tl.constexpr):
    """Cells of the k-th tile: x (1, 1, WP), y (1, HB, 1), index and whether they exist (1, HB, WP)."""
    x, y = tl.arange(0, WP)[None, None, :], k * HB + tl.arange(0, HB)[None, :, None]
    return x, y, y * w + x, ((x < w) & (y < h)) | FULL


@triton.jit
def _flat(v):
    """(R, HB, WP) -> (R, HB * WP)."""
    return tl.reshape(v, (v.shape[0], v.shape[1] * v.shape[2]))


@triton.jit
def _each(v):
    """(R,) -> (R, 1, 1)."""
    return v[:, None, None]


@triton.jit
def _factor(scale, at, x, y, w, extent, KIND: tl.constexpr):
    """What scores of a row, cell by cell, are multiplied by: `scale` and the Gaussian around cell `at`."""
    factor = _each(scale)
    if KIND == GAUSSIAN:
        dx, dy = (x - _each(at % w)).to(tl.float32), (y - _each(at // w)).to(tl.float32)
        factor = factor * tl.exp2(dy * dy * extent) * tl.exp2(dx * dx * extent)
    return factor


@triton.jit
def _counted(inside, at, x, y, w, extent, KIND: tl.constexpr):
    """Which cells have weight: those that exist and, of a crop, lie within the radius `extent` of cell `at`."""
    if KIND == CROP:
        dx, dy = tl.abs(x - _each(at % w)).to(tl.float32), tl.abs(y - _each(at // w)).to(tl.float32)
        inside = inside & (dx <= extent) & (dy <= extent)
    return inside


@triton.jit
def _rows(first_item, first_point, rows, N, a, temperature, R: tl.constexpr):
    """This program's item of the strip, its rows, which of them exist, their points, and scales a log2(e) / T."""
    item, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    point = (first_item + item) * N + first_point + row
    scale = LOG2E / tl.load(temperature) * tl.load(a + point, mask=real, other=0.0)
    return item, row.to(tl.int64), real, point, scale


@triton.jit(do_not_specialize=["first_item", "first_point", "rows"])
def positions(
    block, a, b, temperature, xy, argmax, lse, first_item, first_point, rows, N, h, w, stride, extent,
    KIND: tl.constexpr, FULL: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr, HB: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """`epilogue.read_out` of R rows; `extent` is -log2(e) / (2 sigma²) or the radius."""
    item, row, real, point, scale = _rows(first_item, first_point, rows, N, a, temperature, R)
    block += item * stride
    b += (first_item + item) * h * w
    top = tl.full((R,), float("-inf"), tl.float32)
    at = tl.full((R,), 0, tl.int32)
    t = tl.zeros((R, HB, WP), tl.float32)
    for k in range(TILES):
        x, y, cell, inside = _tile(k, h, w, FULL, HB, WP)
        t = tl.load(block + _each(row) * h * w + cell, mask=inside & _each(real), other=0.0)
        t *= tl.load(b + cell, mask=inside, other=0.0)
        t = tl.where(t == t, t, float("inf"))  # as torch's, the first NaN is the maximum, and positions become NaN
        t = tl.where(inside, t, float("-inf"))
        best = tl.max(_flat(t), axis=1)
        first = tl.min(_flat(tl.where(t == _each(best), cell, NOWHERE)), axis=1)
        at, top = tl.where(best > top, first, at), tl.maximum(best, top)
    high = top * scale
    if KIND == GAUSSIAN:
        high = tl.full((R,), float("-inf"), tl.float32)
    mass, sum_x, sum_y = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for k in range(TILES):
        x, y, cell, inside = _tile(k, h, w, FULL, HB, WP)
        if TILES > 1:  # else the row is in registers
            t = tl.load(block + _each(row) * h * w + cell, mask=inside & _each(real), other=0.0)
            t *= tl.load(b + cell, mask=inside, other=0.0)
        z = t * _factor(scale, at, x, y, w, extent, KIND)
        z = tl.where(_counted(inside, at, x, y, w, extent, KIND), z, float("-inf"))
        if KIND == GAUSSIAN:  # else the maximum is known
            old, high = high, tl.maximum(high, tl.max(_flat(z), axis=1))
            old = tl.exp2(old - high)
            mass, sum_x, sum_y = mass * old, sum_x * old, sum_y * old
        e = tl.exp2(z - _each(high))
        mass += tl.sum(_flat(e), axis=1)
        sum_x += tl.sum(_flat(e * x.to(tl.float32)), axis=1)
        sum_y += tl.sum(_flat(e * y.to(tl.float32)), axis=1)
    tl.store(xy + 2 * point, sum_x / mass + 0.5, mask=real)
    tl.store(xy + 2 * point + 1, sum_y / mass + 0.5, mask=real)
    tl.store(argmax + point, at.to(tl.int64), mask=real)
    tl.store(lse + point, high + tl.log2(mass), mask=real)


@triton.jit(do_not_specialize=["first_item", "first_point", "rows"])
def product_gradients(
    block, out, a, b, temperature, xy, argmax, lse, dxy, moments,
    first_item, first_point, rows, N, h, w, stride, extent,
    KIND: tl.constexpr, MOMENTS: tl.constexpr, FULL: tl.constexpr, TILES: tl.constexpr,
    R: tl.constexpr, HB: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """`epilogue.score_gradients` of R rows, to `out` (b, r, M), which may be `block`; parts of dT to `moments`."""
    item, row, real, point, scale = _rows(first_item, first_point, rows, N, a, temperature, R)
    block += item * stride
    out += item * rows * h * w
    b += (first_item + item) * h * w
    at = tl.load(argmax + point, mask=real, other=0).to(tl.int32)
    shift = _each(tl.load(lse + point, mask=real, other=0.0))
    slope_x = _each(tl.load(dxy + 2 * point, mask=real, other=0.0)) / LOG2E
    slope_y = _each(tl.load(dxy + 2 * point + 1, mask=real, other=0.0)) / LOG2E
    mean_x = _each(tl.load(xy + 2 * point, mask=real, other=0.0)) - 0.5
    mean_y = _each(tl.load(xy + 2 * point + 1, mask=real, other=0.0)) - 0.5
    moment = tl.zeros((R,), tl.float32)
    for k in range(TILES):
        x, y, cell, inside = _tile(k, h, w, FULL, HB, WP)
        factor, scale_b = _factor(scale, at, x, y, w, extent, KIND), tl.load(b + cell, mask=inside, other=0.0)
        z = tl.load(block + _each(row) * h * w + cell, mask=inside & _each(real), other=0.0)
        log_p = z * scale_b * factor - shift  # rounded as in the forward
        d = tl.exp2(log_p) * ((x.to(tl.float32) - mean_x) * slope_x + (y.to(tl.float32) - mean_y) * slope_y)
        d = tl.where(_counted(inside, at, x, y, w, extent, KIND), d, 0.0)
        if MOMENTS:
            moment += tl.sum(_flat(d * log_p), axis=1)
        to = out + _each(row) * h * w + cell
        tl.store(to, (d * factor * scale_b).to(out.dtype.element_ty), mask=inside & _each(real))
    if MOMENTS:
        tl.store(moments + item * rows + row, moment, mask=real)


@triton.jit
def _channels(x, row, n, k, C, stride_n, stride_c, TILE_C: tl.constexpr):
    """Channels (R, TILE_C) of some rows of x (n, C) in float32, their indices, and whether they exist."""
    c = k * TILE_C + tl.arange(0, TILE_C)
    exist = (row < n)[:, None] & (c < C)[None, :]
    return tl.load(x + row[:, None] * stride_n + c[None, :] * stride_c, mask=exist, other=0.0).to(tl.float32), c, exist


@triton.jit
def _norm(x, out, tile, n, C, stride_b, stride_n, stride_c, R: tl.constexpr, TILE_C: tl.constexpr):
    item, row = tl.program_id(1).to(tl.int64), tile * R + tl.arange(0, R)
    total = tl.zeros((R,), tl.float32)
    for k in range(tl.cdiv(C, TILE_C)):
        v, _, _ = _channels(x + item * stride_b, row, n, k, C, stride_n, stride_c, TILE_C)
        total += tl.sum(v * v, axis=1)
    tl.store(out + item * n + row, tl.where(total > 0, 1 / tl.sqrt(total), 0.0), mask=row < n)


@triton.jit
def norms(src, trg, a, b, N, M, C, src_b, src_n, src_c, trg_b, trg_n, trg_c, R: tl.constexpr, TILE_C: tl.constexpr):
    """`epilogue.inverse_norms`: of source features in the first programs, of target features in the others."""
    tile, tiles = tl.program_id(0), tl.cdiv(N, R)
    if tile < tiles:
        _norm(src, a, tile, N, C, src_b, src_n, src_c, R, TILE_C)
    else:
        _norm(trg, b, tile - tiles, M, C, trg_b, trg_n, trg_c, R, TILE_C)


@triton.jit
def remove_along(
    grad, x, scale, out, n, C, stride_b, stride_n, stride_c, R: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """`epilogue.across` of R rows of one side, to `out` (B, n, C)."""
    item, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
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


def tile(rows: Rows) -> dict[str, object]:
    """Compile-time constants of the kernels that take rows."""
    h, w = rows.grid
    WP = triton.next_power_of_2(w)
    HB = triton.next_power_of_2(h)
    if HB * WP > CELLS:  # a row is read twice, in tiles that leave registers free
        HB = max(1, CELLS // 4 // WP)
    R, tiles = max(1, ELEMENTS // (HB * WP)), triton.cdiv(h, HB)
    constants = {"KIND": KINDS[rows.kind], "FULL": WP == w and HB * tiles == h, "TILES": tiles}
    constants |= {"R": R, "HB": HB, "WP": WP}
    return constants | {"num_warps": min(16, max(1, R * HB * WP // (32 * PER_THREAD)))}


def gradient_dtype(features: torch.dtype) -> torch.dtype:
    """bfloat16 for half precision: it has the range that gradients of scores need, and float16 has not."""
    return torch.float32 if features == torch.float32 else torch.bfloat16


def inverse_norms(src: Tensor, trg: Tensor, rows: Rows) -> None:
    """`epilogue.inverse_norms`."""
    (B, N, C), M = src.shape, trg.shape[1]
    grid = (triton.cdiv(N, FEATURES["R"]) + triton.cdiv(M, FEATURES["R"]), B)
    norms[grid](src, trg, rows.a, rows.b, N, M, C, *src.stride(), *trg.stride(), **FEATURES)


def read_out(block: Tensor, at: Piece, rows: Rows) -> None:
    """`epilogue.read_out`, which leaves `block` as it is."""
    outputs = (rows.values, rows.argmax, rows.lse)
    _launch(positions, block, at, rows, (block, rows.a, rows.b, rows.temperature, *outputs))


def score_gradients(
    block: Tensor, at: Piece, rows: Rows, grad: Tensor, out: Tensor, known: bool, temperature: bool
) -> Tensor | None:
    """`epilogue.score_gradients`, for which `block` always has products."""
    moments = block.new_empty(block.shape[:2] if temperature else 0)
    inputs = (rows.a, rows.b, rows.temperature, rows.values, rows.argmax, rows.lse, grad.contiguous())
    _launch(product_gradients, block, at, rows, (block, out, *inputs, moments), MOMENTS=temperature)
    return moments.sum() if temperature else None


def across(grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """`epilogue.across`, in the dtype of the features."""
    out = torch.empty_like(grad, dtype=x.dtype)
    grid = (triton.cdiv(x.shape[1], FEATURES["R"]), x.shape[0])
    remove_along[grid](grad, x, scale, out, *x.shape[1:], *x.stride(), **FEATURES)
    return out


def _launch(kernel, block: Tensor, at: Piece, rows: Rows, tensors: tuple[Tensor, ...], **constants: bool) -> None:
    constants |= tile(rows)
    extent = rows.extent if rows.kind == "crop" else -LOG2E.value / (2 * rows.extent**2 or 1.0)
    sizes = (at[0].start, at[1].start, block.shape[1], rows.a.shape[1], *rows.grid, block.stride(0), extent)
    kernel[(triton.cdiv(block.shape[1], constants["R"]), block.shape[0])](*tensors, *sizes, **constants)
