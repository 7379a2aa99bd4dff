# mypy: disallow-untyped-defs=False
"""The op as Triton kernels: a GEMM over tiles of the correlation whose epilogue reduces each tile where it is made.

Scores are <f_i, g_j> a_i b_j: features as they come, their products summed in float32, the inverse norms a and b
applied to the sum. So half-precision features lose nothing by being normalised. Logits are to base 2.

Every kernel has a torch twin in `streaming`, which says what it computes; `launch` allocates and combines.
"""

import triton
import triton.language as tl

PLAIN, GAUSSIAN, CROP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _products(
    src, trg, item, rows, cols, N, M, C, src_b, src_n, src_c, trg_b, trg_m, trg_c,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_C: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """<f_i, g_j> of points `rows` and cells `cols` in four quarters (TILE_N, TILE_M / 4); 0 beyond N or M.

    Epilogues work on a quarter at a time because a whole tile and what they compute from it do not fit the registers.
    """
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
    left, right = tl.split(tl.permute(tl.reshape(out, (TILE_N, 2, TILE_M // 2)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(left, (TILE_N, 2, TILE_M // 4)), (0, 2, 1)))
    c, d = tl.split(tl.permute(tl.reshape(right, (TILE_N, 2, TILE_M // 4)), (0, 2, 1)))
    return a, b, c, d


@triton.jit
def _scores(products, a, b, item, cols, M, NORMALIZE: tl.constexpr):
    """Scores from products; `a` are the rows' inverse norms, `b` points to the cells'."""
    if NORMALIZE:
        products *= a[:, None]
        products *= tl.load(b + item * M + cols, mask=cols < M, other=0.0)[None, :]
    return products


@triton.jit
def _better(best, at, scores, cols, M):
    """Row maxima (best, at) with another tile's scores (TILE_N, cells `cols`); a NaN counts as infinity."""
    scores = tl.where(scores == scores, scores, float("inf"))
    scores = tl.where((cols < M)[None, :], scores, float("-inf"))
    tile = tl.max(scores, axis=1)
    tile_at = tl.min(tl.where(scores == tile[:, None], cols[None, :], 2147483647), axis=1)
    return tl.maximum(best, tile), tl.where(tile > best, tile_at, at)  # earlier cells win ties


@triton.jit
def _factor(beta, cx, cy, cols, w, extent, KIND: tl.constexpr):
    """What scores are multiplied with to be logits: beta, times the window; `extent` is log2(e) / (2 sigma²)."""
    factor = beta
    if KIND == GAUSSIAN:
        dx, dy = (cols % w).to(tl.float32)[None, :] + 0.5 - cx, (cols // w).to(tl.float32)[None, :] + 0.5 - cy
        factor = beta * tl.exp2(-(dx * dx + dy * dy) * extent)
    return factor


@triton.jit
def _inside(cx, cy, cols, M, w, extent, KIND: tl.constexpr):
    """Which cells count: those that exist and, of a crop, lie within the radius `extent`."""
    inside = (cols < M)[None, :]
    if KIND == CROP:
        dx, dy = (cols % w).to(tl.float32)[None, :] + 0.5 - cx, (cols // w).to(tl.float32)[None, :] + 0.5 - cy
        inside = inside & (tl.abs(dx) <= extent) & (tl.abs(dy) <= extent)
    return inside


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
    norms = tl.load(a + item * N + rows, mask=rows < N, other=0.0) if NORMALIZE else 0.0
    start = tl.program_id(1) * span
    best = tl.full((TILE_N,), float("-inf"), dtype=tl.float32)
    at = tl.full((TILE_N,), 2147483647, dtype=tl.int32)
    for first in range(start, tl.minimum(start + span, M), TILE_M):
        quarters = _products(src, trg, item, rows, first + tl.arange(0, TILE_M), N, M, C, src_b, src_n, src_c, trg_b,
                           trg_m, trg_c, TILE_N, TILE_M, TILE_C, PRECISION, UPCAST)  # fmt: skip
        for quarter in tl.static_range(4):
            cols = first + quarter * (TILE_M // 4) + tl.arange(0, TILE_M // 4)
            s = _scores(quarters[quarter], norms, b, item, cols, M, NORMALIZE)
            best, at = _better(best, at, s, cols, M)
            if COLUMNS:
                s = tl.where((rows < N)[:, None], tl.where(s == s, s, float("inf")), float("-inf"))
                col = tl.max(s, axis=0)
                to = (item * tl.num_programs(0) + tl.program_id(0)) * M + cols
                tl.store(col_best + to, col, mask=cols < M)
                row = tl.min(tl.where(s == col[None, :], rows[:, None], 2147483647), axis=0)
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
    norms = tl.load(a + item * N + rows, mask=rows < N, other=0.0) if NORMALIZE else 0.0
    start = tl.program_id(1) * span
    beta = 1.4426950408889634 / tl.load(temperature)
    if KIND == PLAIN:
        cx, cy = 0.0, 0.0
    else:
        cx = tl.load(centre + (item * N + rows) * 2, mask=rows < N, other=0.0)[:, None]
        cy = tl.load(centre + (item * N + rows) * 2 + 1, mask=rows < N, other=0.0)[:, None]
    top = tl.full((TILE_N,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((TILE_N,), dtype=tl.float32)
    sum_x, sum_y, sum_z = mass, mass, mass
    best, at = top, tl.full((TILE_N,), 2147483647, dtype=tl.int32)
    for first in range(start, tl.minimum(start + span, M), TILE_M):
        quarters = _products(src, trg, item, rows, first + tl.arange(0, TILE_M), N, M, C, src_b, src_n, src_c, trg_b,
                           trg_m, trg_c, TILE_N, TILE_M, TILE_C, PRECISION, UPCAST)  # fmt: skip
        for quarter in tl.static_range(4):
            cols = first + quarter * (TILE_M // 4) + tl.arange(0, TILE_M // 4)
            z = _scores(quarters[quarter], norms, b, item, cols, M, NORMALIZE)
            if BEST:
                best, at = _better(best, at, z, cols, M)
            z *= _factor(beta, cx, cy, cols, w, extent, KIND)
            z = tl.where(_inside(cx, cy, cols, M, w, extent, KIND), z, -1e30)
            old, top = top, tl.maximum(top, tl.max(z, axis=1))
            old = tl.exp2(old - top)
            e = tl.exp2(z - top[:, None])
            mass = mass * old + tl.sum(e, axis=1)
            sum_z = sum_z * old + tl.sum(e * z, axis=1)
            sum_x = sum_x * old + tl.sum(e * ((cols % w).to(tl.float32) + 0.5)[None, :], axis=1)
            sum_y = sum_y * old + tl.sum(e * ((cols // w).to(tl.float32) + 0.5)[None, :], axis=1)
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
    src, trg, a, b, temperature, centre, argmax, rows_in, out, moments,
    first_row, strip, N, M, C, w, src_b, src_n, src_c, trg_b, trg_m, trg_c, plane, moment_plane, extent,
    KIND: tl.constexpr, MOMENTS: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_C: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the products <f_i, g_j> of rows first_row ... + strip, to out (B, strip, M), a tile a program.

    `rows_in` (6, B, N), planes of size `plane`, has what rows contribute: a logit's gradient is
    p (x slope_x + y slope_y + offset - z slope_z), p = 2^(z - lse); a maximum's gradient goes to its cell.
    `moments` (3, B, strip, 4 column tiles), planes of size `moment_plane`, gets the sums of u = dlogit * logit,
    u (x - cx) and u (y - cy): what the temperature and the centre need.
    """
    item = tl.program_id(2).to(tl.int64)
    inner = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    rows = first_row + inner
    first = tl.program_id(0) * TILE_M
    quarters = _products(src, trg, item, rows, first + tl.arange(0, TILE_M), N, M, C, src_b, src_n, src_c, trg_b,
                       trg_m, trg_c, TILE_N, TILE_M, TILE_C, PRECISION, UPCAST)  # fmt: skip
    inside = inner < strip
    beta = 1.4426950408889634 / tl.load(temperature)
    point = item * N + rows
    norms = tl.load(a + point, mask=inside, other=0.0) if NORMALIZE else 0.0
    cx = tl.load(centre + point * 2, mask=inside, other=0.0)[:, None]
    cy = tl.load(centre + point * 2 + 1, mask=inside, other=0.0)[:, None]
    slope_x = tl.load(rows_in + point, mask=inside, other=0.0)[:, None]
    slope_y = tl.load(rows_in + point + plane, mask=inside, other=0.0)[:, None]
    slope_z = tl.load(rows_in + point + 2 * plane, mask=inside, other=0.0)[:, None]
    offset = tl.load(rows_in + point + 3 * plane, mask=inside, other=0.0)[:, None]
    lse = tl.load(rows_in + point + 4 * plane, mask=inside, other=0.0)[:, None]
    dmax = tl.load(rows_in + point + 5 * plane, mask=inside, other=0.0)[:, None]
    best = tl.load(argmax + point, mask=inside, other=-1)[:, None]
    for quarter in tl.static_range(4):
        cols = first + quarter * (TILE_M // 4) + tl.arange(0, TILE_M // 4)
        z = _scores(quarters[quarter], norms, b, item, cols, M, NORMALIZE)
        factor = _factor(beta, cx, cy, cols, w, extent, KIND)
        z = tl.where(_inside(cx, cy, cols, M, w, extent, KIND), z * factor, -1e30)
        dx, dy = (cols % w).to(tl.float32)[None, :] + 0.5 - cx, (cols // w).to(tl.float32)[None, :] + 0.5 - cy
        d = (dx * slope_x + dy * slope_y + offset - z * slope_z) * tl.exp2(z - lse)
        if MOMENTS:
            u = d * z
            to = moments + (item * strip + inner) * (4 * tl.num_programs(0)) + 4 * tl.program_id(0) + quarter
            tl.store(to, tl.sum(u, axis=1), mask=inside)
            tl.store(to + moment_plane, tl.sum(u * dx, axis=1), mask=inside)
            tl.store(to + 2 * moment_plane, tl.sum(u * dy, axis=1), mask=inside)
        d = _scores(d * factor + tl.where(cols[None, :] == best, dmax, 0.0), norms, b, item, cols, M, NORMALIZE)
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
