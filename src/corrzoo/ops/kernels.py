"""The op as Triton kernels: a GEMM over tiles of the correlation whose epilogue reduces each tile where it is made.

Scores are <f_i, g_j> a_i b_j: features as they come, their products summed in float32, the inverse norms a and b applied
to the sum. So half-precision features lose nothing by being normalised. Exponentials are to base 2.

Every kernel has a torch twin in `streaming`, which says what it computes; `launch` allocates and combines.
"""

import triton
import triton.language as tl

PLAIN, GAUSSIAN, CROP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _scores(
    src, trg, a, b, item, rows, cols, N, M, C, src_b, src_n, src_c, trg_b, trg_m, trg_c,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_C: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(TILE_N, TILE_M) float32 scores of points `rows` and cells `cols`; 0 beyond N or M."""
    channels = tl.arange(0, TILE_C)
    src += item * src_b + rows[:, None] * src_n + channels[None, :] * src_c
    trg += item * trg_b + cols[None, :] * trg_m + channels[:, None] * trg_c
    out = tl.zeros((TILE_N, TILE_M), dtype=tl.float32)
    for c in range(0, C, TILE_C):
        f = tl.load(src, mask=(rows < N)[:, None] & (channels < C - c)[None, :], other=0.0)
        g = tl.load(trg, mask=(cols < M)[None, :] & (channels < C - c)[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bfloat16
            f, g = f.to(tl.float32), g.to(tl.float32)
        out = tl.dot(f, g, out, input_precision=PRECISION)
        src += TILE_C * src_c
        trg += TILE_C * trg_c
    if NORMALIZE:
        out *= tl.load(a + item * N + rows, mask=rows < N, other=0.0)[:, None]
        out *= tl.load(b + item * M + cols, mask=cols < M, other=0.0)[None, :]
    return out


@triton.jit
def _first_best(scores, index, AXIS: tl.constexpr):
    """Maximum along an axis and the lowest `index` that has it; a NaN counts, and comes back, as infinity."""
    best = tl.max(scores, axis=AXIS)
    at = tl.where(scores == tl.expand_dims(best, AXIS), index, 2147483647)
    return best, tl.min(at, axis=AXIS)


@triton.jit
def _logits(scores, beta, dx, dy, extent, KIND: tl.constexpr):
    """Logits (base 2) from scores, and what a score was multiplied with. `extent` is -log2(e) / (2 sigma²), or radius."""
    factor = tl.zeros_like(scores) + beta
    if KIND == GAUSSIAN:
        factor = beta * tl.exp2((dx * dx + dy * dy) * extent)
    logits = scores * factor
    if KIND == CROP:
        logits = tl.where((tl.abs(dx) <= extent) & (tl.abs(dy) <= extent), logits, float("-inf"))
    return logits, factor


@triton.jit
def maxima(
    src, trg, a, b, row_best, row_at, col_best, col_at,
    N, M, C, src_b, src_n, src_c, trg_b, trg_m, trg_c, span,
    COLUMNS: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_C: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maxima of TILE_N rows over `span` columns, to row_* (B, N, splits); of columns to col_* (B, row tiles, M)."""
    item = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    start = tl.program_id(1) * span
    best = tl.full((TILE_N,), float("-inf"), dtype=tl.float32)
    at = tl.full((TILE_N,), 2147483647, dtype=tl.int32)
    for first in range(start, tl.minimum(start + span, M), TILE_M):
        cols = first + tl.arange(0, TILE_M)
        s = _scores(src, trg, a, b, item, rows, cols, N, M, C, src_b, src_n, src_c, trg_b, trg_m, trg_c,
                    TILE_N, TILE_M, TILE_C, NORMALIZE, PRECISION, UPCAST)  # fmt: skip
        s = tl.where(s == s, s, float("inf"))
        s = tl.where((rows < N)[:, None] & (cols < M)[None, :], s, float("-inf"))
        tile_best, tile_at = _first_best(s, cols[None, :], 1)
        at = tl.where(tile_best > best, tile_at, at)
        best = tl.maximum(best, tile_best)
        if COLUMNS:
            col, row = _first_best(s, rows[:, None], 0)
            to = (item * tl.num_programs(0) + tl.program_id(0)) * M + cols
            tl.store(col_best + to, col, mask=cols < M)
            tl.store(col_at + to, row, mask=cols < M)
    to = (item * N + rows) * tl.num_programs(1) + tl.program_id(1)
    tl.store(row_best + to, best, mask=rows < N)
    tl.store(row_at + to, at, mask=rows < N)


@triton.jit
def expectation(
    src, trg, a, b, temperature, centre, out, row_at,
    N, M, C, w, src_b, src_n, src_c, trg_b, trg_m, trg_c, span, plane, extent,
    KIND: tl.constexpr, BEST: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_C: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Softmax sums of TILE_N rows over `span` columns: out (6, B, N, splits) = logit maximum, mass, x, y, logits, best.

    The sums are relative to the maximum and weighted by 2^(logit - maximum), `plane` is the size of one of the six.
    """
    item = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    start = tl.program_id(1) * span
    beta = 1.4426950408889634 / tl.load(temperature)
    if KIND != PLAIN:
        cx = tl.load(centre + (item * N + rows) * 2, mask=rows < N, other=0.0)[:, None]
        cy = tl.load(centre + (item * N + rows) * 2 + 1, mask=rows < N, other=0.0)[:, None]
    top = tl.full((TILE_N,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((TILE_N,), dtype=tl.float32)
    sum_x, sum_y, sum_z = mass, mass, mass
    best = top
    at = tl.full((TILE_N,), 2147483647, dtype=tl.int32)
    for first in range(start, tl.minimum(start + span, M), TILE_M):
        cols = first + tl.arange(0, TILE_M)
        s = _scores(src, trg, a, b, item, rows, cols, N, M, C, src_b, src_n, src_c, trg_b, trg_m, trg_c,
                    TILE_N, TILE_M, TILE_C, NORMALIZE, PRECISION, UPCAST)  # fmt: skip
        x, y = (cols % w).to(tl.float32)[None, :] + 0.5, (cols // w).to(tl.float32)[None, :] + 0.5
        if KIND == PLAIN:
            z = s * beta
        else:
            z, _ = _logits(s, beta, x - cx, y - cy, extent, KIND)
        z = tl.where((cols < M)[None, :], z, float("-inf"))
        if BEST:
            s = tl.where(s == s, s, float("inf"))
            tile_best, tile_at = _first_best(tl.where((cols < M)[None, :], s, float("-inf")), cols[None, :], 1)
            at = tl.where(tile_best > best, tile_at, at)
            best = tl.maximum(best, tile_best)
        new = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        e = tl.exp2(z - base[:, None])
        old = tl.exp2(top - base)
        mass = mass * old + tl.sum(e, axis=1)
        sum_x = sum_x * old + tl.sum(e * x, axis=1)
        sum_y = sum_y * old + tl.sum(e * y, axis=1)
        sum_z = sum_z * old + tl.sum(tl.where(e > 0, e * z, 0.0), axis=1)
        top = new
    out += (item * N + rows) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out, top, mask=rows < N)
    tl.store(out + plane, mass, mask=rows < N)
    tl.store(out + 2 * plane, sum_x, mask=rows < N)
    tl.store(out + 3 * plane, sum_y, mask=rows < N)
    tl.store(out + 4 * plane, sum_z, mask=rows < N)
    if BEST:
        tl.store(out + 5 * plane, best, mask=rows < N)
        tl.store(row_at + (item * N + rows) * tl.num_programs(1) + tl.program_id(1), at, mask=rows < N)


@triton.jit
def score_gradients(
    src, trg, a, b, temperature, centre, argmax, xy, lse, entropy, dxy, dmax, dlse, dentropy, out, moments,
    first_row, strip, N, M, C, w, src_b, src_n, src_c, trg_b, trg_m, trg_c, plane, extent,
    KIND: tl.constexpr, MOMENTS: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_C: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the products <f_i, g_j> of rows first_row ... + strip, to out (B, strip, M), a tile a program.

    `moments` (3, B, strip, column tiles), planes of size `plane`, gets the sums over a tile's columns of
    u = dlogit * logit, u (x - cx) and u (y - cy): what the temperature and the centre need.
    """
    item = tl.program_id(2).to(tl.int64)
    inner = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    rows = first_row + inner
    cols = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    inside = inner < strip
    beta = 1.4426950408889634 / tl.load(temperature)
    s = _scores(src, trg, a, b, item, rows, cols, N, M, C, src_b, src_n, src_c, trg_b, trg_m, trg_c,
                TILE_N, TILE_M, TILE_C, NORMALIZE, PRECISION, UPCAST)  # fmt: skip
    point = item * N + rows
    x, y = (cols % w).to(tl.float32)[None, :] + 0.5, (cols // w).to(tl.float32)[None, :] + 0.5
    cx = tl.load(centre + point * 2, mask=inside, other=0.0)[:, None]
    cy = tl.load(centre + point * 2 + 1, mask=inside, other=0.0)[:, None]
    z, factor = _logits(s, beta, x - cx, y - cy, extent, KIND)
    row_lse = tl.load(lse + point, mask=inside, other=0.0)[:, None]
    p = tl.exp2(z - row_lse * 1.4426950408889634)
    z = tl.where(p == 0, 0.0, z) * 0.6931471805599453
    d = (x - tl.load(xy + point * 2, mask=inside, other=0.0)[:, None]) * tl.load(
        dxy + point * 2, mask=inside, other=0.0
    )[:, None]
    d += (y - tl.load(xy + point * 2 + 1, mask=inside, other=0.0)[:, None]) * tl.load(
        dxy + point * 2 + 1, mask=inside, other=0.0
    )[:, None]
    d += tl.load(dlse + point, mask=inside, other=0.0)[:, None]
    row_entropy = tl.load(entropy + point, mask=inside, other=0.0)[:, None]
    d -= tl.load(dentropy + point, mask=inside, other=0.0)[:, None] * (z - row_lse + row_entropy)
    d *= p
    if MOMENTS:
        u = tl.where((cols < M)[None, :], d * z, 0.0)
        to = moments + (item * strip + inner) * tl.num_programs(0) + tl.program_id(0)
        tl.store(to, tl.sum(u, axis=1), mask=inside)
        tl.store(to + plane, tl.sum(u * (x - cx), axis=1), mask=inside)
        tl.store(to + 2 * plane, tl.sum(u * (y - cy), axis=1), mask=inside)
    d *= factor * 0.6931471805599453
    best = tl.load(argmax + point, mask=inside, other=-1)[:, None]
    d += tl.where(cols[None, :] == best, tl.load(dmax + point, mask=inside, other=0.0)[:, None], 0.0)
    if NORMALIZE:
        d *= tl.load(a + point, mask=inside, other=0.0)[:, None]
        d *= tl.load(b + item * M + cols, mask=cols < M, other=0.0)[None, :]
    to = out + (item * strip + inner[:, None]) * M + cols[None, :]
    tl.store(to, d.to(out.dtype.element_ty), mask=inside[:, None] & (cols < M)[None, :])


@triton.jit
def _patch(corner, point, h, w, SIDE: tl.constexpr, CELLS: tl.constexpr):
    """Indices of a square's cells, and which of them exist and lie in the target."""
    k = tl.arange(0, CELLS)
    x = tl.load(corner + point * 2) + k % SIDE
    y = tl.load(corner + point * 2 + 1) + k // SIDE
    return y * w + x, (k < SIDE * SIDE) & (x >= 0) & (x < w) & (y >= 0) & (y < h)


@triton.jit
def patch_scores(
    src, trg, corner, out, N, C, h, w, SIDE: tl.constexpr, CELLS: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """Scores of one source point in its square of cells, to out (B, N, SIDE²)."""
    item = tl.program_id(1).to(tl.int64)
    point = item * N + tl.program_id(0)
    cells, inside = _patch(corner, point, h, w, SIDE, CELLS)
    sums = tl.zeros((CELLS,), dtype=tl.float32)
    for first in range(0, C, TILE_C):
        c = first + tl.arange(0, TILE_C)
        f = tl.load(src + point * C + c, mask=c < C, other=0.0)
        g = tl.load(
            trg + (item * h * w + cells)[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0
        )
        sums += tl.sum(f[None, :] * g, axis=1)
    k = tl.arange(0, CELLS)
    tl.store(out + point * SIDE * SIDE + k, sums, mask=k < SIDE * SIDE)


@triton.jit
def patch_gradients(
    grad, src, trg, corner, dsrc, dtrg, N, C, h, w, SIDE: tl.constexpr, CELLS: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """Gradients of `patch_scores`: to dsrc (B, N, C), and added to dtrg (B, h, w, C) in no fixed order."""
    item = tl.program_id(1).to(tl.int64)
    point = item * N + tl.program_id(0)
    cells, inside = _patch(corner, point, h, w, SIDE, CELLS)
    k = tl.arange(0, CELLS)
    d = tl.load(grad + point * SIDE * SIDE + k, mask=inside, other=0.0)
    for first in range(0, C, TILE_C):
        c = first + tl.arange(0, TILE_C)
        f = tl.load(src + point * C + c, mask=c < C, other=0.0)
        where = (item * h * w + cells)[:, None] * C + c[None, :]
        mask = inside[:, None] & (c < C)[None, :]
        g = tl.load(trg + where, mask=mask, other=0.0)
        tl.store(dsrc + point * C + c, tl.sum(d[:, None] * g, axis=0), mask=c < C)
        tl.atomic_add(dtrg + where, d[:, None] * f[None, :], mask=mask)
