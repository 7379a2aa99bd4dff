"""The op in strips, for any device: a strip holds whole rows of the correlation, is worked on in place, and is gone.

A strip is what one GEMM makes. Passes go over it in chunks that stay in a processor's cache from one pass to the next,
so that they cost little beside the GEMM. Windows are separable (a Gaussian is a product over x and y, a crop a sum of
penalties), and so are the means of x and y: passes work on rows and columns of the target grid. Target features keep
their own length; 1 / |g_j| is a factor of column j, which spares a copy of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from corrzoo.geometry import Size
from corrzoo.ops.reference import OUTSIDE, Matches, Mutual, full, inverse_norm

Piece = tuple[slice, slice]
"""Of the batch, and of the points: several whole matrices, or some rows of one."""


class Window(NamedTuple):
    """How scores become logits; the fields are the arguments of `corrzoo.ops.match`."""

    grid: Size
    kind: str
    sigma: float
    radius: int


class Grads(NamedTuple):
    """Gradients of `Matches`, None where there is none."""

    xy: Tensor | None
    max: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None


def pieces(batch: int, points: range, width: int, elements: int, rows: int = 1) -> Iterator[Piece]:
    """Pieces of (batch, points, width) that have at most `elements` elements, but at least `rows` rows."""
    rows, items = max(rows, elements // width), max(1, elements // (max(1, len(points)) * width))
    for b in range(0, batch, items):
        for r in range(points.start, points.stop, rows):
            yield slice(b, min(b + items, batch)), slice(r, min(r + rows, points.stop))


class Scores:
    """The correlation of src (B, N, C) and trg (B, M, C): strips to multiply, chunks of them to pass over.

    No strip has points on both sides of point number `keep`.
    """

    STRIP, CHUNK, ROWS = {"cpu": 2**19}, {"cpu": 2**18}, 512
    """Elements; at least 512 rows for the GEMM's sake. On a CPU a chunk is 1 MB, which a core's cache holds."""
    ELSEWHERE = 2**24
    """Both, on other devices: enough to fill a GPU."""

    def __init__(self, src: Tensor, trg: Tensor, normalize: bool, keep: int = 0) -> None:
        self.src, self.trg, self.cells = src, full(trg), trg.shape[1]
        self.src_scale = inverse_norm(src).unsqueeze(2) if normalize else None  # (B, N, 1)
        self.trg_scale = inverse_norm(trg).unsqueeze(1) if normalize else None  # (B, 1, M)
        strip, self.chunk = (sizes.get(src.device.type, self.ELSEWHERE) for sizes in (self.STRIP, self.CHUNK))
        halves = (range(keep), range(keep, src.shape[1]))
        self.strips = [at for half in halves for at in pieces(src.shape[0], half, self.cells, strip, self.ROWS)]
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, at: Piece) -> Tensor:
        """(b, r, M) of memory, the same at every call."""
        shape = (at[0].stop - at[0].start, at[1].stop - at[1].start, self.cells)
        size = shape[0] * shape[1] * shape[2]
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self.trg.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def points(self, at: Piece) -> Tensor:
        """The strip's source features (b, r, C), of unit length where asked."""
        return full(self.src[at]) if self.src_scale is None else full(self.src[at]) * self.src_scale[at]

    def multiply(self, out: Tensor, at: Piece) -> Tensor:
        """Products (b, r, M) of unit source features with target features as they are, written to `out`."""
        return torch.bmm(self.points(at), self.trg[at[0]].mT, out=out)

    def scale(self, x: Tensor, at: Piece, out: Tensor) -> Tensor:
        """Products to scores, or gradients of scores to those of products."""
        return out.copy_(x) if self.trg_scale is None else torch.mul(x, self.trg_scale[at[0]], out=out)

    def chunks(self, at: Piece) -> Iterator[tuple[Piece, Piece]]:
        """Pieces of a strip: where they are in the whole, and where in the strip."""
        b, r = at[0].start, at[1].start
        for i, j in pieces(at[0].stop - b, range(at[1].stop - r), self.cells, self.chunk):
            yield (slice(b + i.start, b + i.stop), slice(r + j.start, r + j.stop)), (i, j)


def row_maxima(x: Tensor) -> tuple[Tensor, Tensor]:
    """x.max(-1) of (b, r, M). Where M allows, blocks' maxima come first: without indices they are a vectorised pass."""
    if x.shape[-1] % 64:
        best, at = x.max(dim=-1)
        return best, at
    blocks = x.unflatten(-1, (-1, 64))
    best, first = blocks.amax(-1).max(dim=-1)
    within = blocks.take_along_dim(first[..., None, None], dim=2).squeeze(2).argmax(-1)
    return best, first * 64 + within


def match(
    src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor | None, window: Window, normalize: bool, keep: int
) -> tuple[Matches, Tensor]:
    """`corrzoo.ops.match` without a gradient, and the logits (B, keep, M) of the first `keep` points of each item.

    Args: src (B, N, C), trg (B, M, C), temperature 0-d, centre (B, N, 2) for the window "given".
    """
    scores, beta = Scores(src, trg, normalize, keep), full(1 / temperature)
    x, y = _axes(window, scores.trg)
    kept = scores.trg.new_empty(src.shape[0], keep, scores.cells)
    best, lse, entropy = (scores.trg.new_empty(src.shape[:2]) for _ in range(3))
    argmax = torch.empty(src.shape[:2], dtype=torch.int64, device=src.device)
    xy = scores.trg.new_empty(*src.shape[:2], 2)
    for strip in scores.strips:
        block = scores.multiply(kept[strip] if strip[1].stop <= keep else scores.buffer("strip", strip), strip)
        for at, inner in scores.chunks(strip):
            z = scores.scale(block[inner], at, block[inner])
            best[at], argmax[at] = row_maxima(z)
            _to_logits_(z, beta, window, *_offsets(window, x, y, centre, argmax, at))
            p = torch.softmax(z, dim=-1, out=scores.buffer("p", at))
            lse[at] = z.amax(-1) - p.amax(-1).log()
            grid = p.unflatten(-1, window.grid)
            xy[at] = torch.stack([grid.sum(2) @ x, grid.sum(3) @ y], dim=-1)
            entropy[at] = lse[at] - p.mul_(z).sum(-1)
    return Matches(xy, best, argmax, lse, entropy), kept


def match_backward(
    grads: Grads, src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor | None, matches: Matches, kept: Tensor,
    window: Window, normalize: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `match` to src, trg, temperature and centre; an empty tensor for what `needs` does not name.

    With logits z, weights p and cell centres v, the gradient of a logit is p_j times a sum over x and over y,
    dz_j = p_j (<dxy, v_j - xy> + dlse - dentropy (z_j - lse + entropy)), and that of a score dz_j times w_j / T.
    """
    scores, beta = Scores(src, trg, normalize, kept.shape[1]), full(1 / temperature)
    x, y = _axes(window, scores.trg)
    dsrc = scores.trg.new_empty(src.shape if needs[0] else 0)
    dtrg = scores.trg.new_zeros(trg.shape if needs[1] else 0)
    dtemperature = scores.trg.new_zeros(() if needs[2] else 0)
    dcentre = scores.trg.new_empty((*src.shape[:2], 2) if needs[3] else 0)
    for strip in scores.strips:
        known, block = strip[1].stop <= kept.shape[1], scores.buffer("strip", strip)
        logits = kept[strip] if known else scores.multiply(block, strip)
        for at, inner in scores.chunks(strip):
            dx, dy = _offsets(window, x, y, centre, matches.argmax, at)
            z = logits[inner]
            if not known:
                _to_logits_(scores.scale(z, at, z), beta, window, dx, dy)
            p = torch.softmax(z, dim=-1, out=scores.buffer("p", at))
            d = _logit_factors(grads, matches, at, z, x, y, scores.buffer("d", at)).mul_(p)
            if needs[2] or needs[3]:
                moment = torch.mul(d, z, out=p).unflatten(-1, window.grid)
                moment_x, moment_y = moment.sum(2), moment.sum(3)
                if needs[2]:
                    dtemperature -= moment_x.sum() * beta
                if needs[3]:
                    mean = [(moment_x * dx).sum(-1), (moment_y * dy).sum(-1)]
                    dcentre[at] = torch.stack(mean, dim=-1) / window.sigma**2
            _weigh_(d, beta, window, dx, dy)
            if grads.max is not None:
                d.scatter_add_(2, matches.argmax[at].unsqueeze(-1), full(grads.max[at]).unsqueeze(-1))
            scores.scale(d, at, block[inner])
        if needs[0]:
            dsrc[strip] = torch.bmm(block, scores.trg[strip[0]])
        if needs[1]:
            dtrg[strip[0]].baddbmm_(block.mT, scores.points(strip))
    if needs[0] and scores.src_scale is not None:
        across_(dsrc.mul_(scores.src_scale), src, scores.src_scale)
    if needs[1] and scores.trg_scale is not None:
        across_(dtrg, trg, scores.trg_scale.mT)
    return dsrc.to(src.dtype), dtrg.to(trg.dtype), dtemperature, dcentre


def _axes(window: Window, like: Tensor) -> tuple[Tensor, Tensor]:
    """x (w,) and y (h,) of the target's cell centres."""
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5 for n in window.grid)
    return x, y


def _offsets(
    window: Window, x: Tensor, y: Tensor, centre: Tensor | None, argmax: Tensor, at: Piece
) -> tuple[Tensor, Tensor]:
    """(b, r, w) and (b, r, h): the cells' columns and rows as seen from the window's centre."""
    if window.kind == "given" and centre is not None:
        cx, cy = centre[at].unsqueeze(-2).unbind(-1)
    else:
        cx, cy = x[argmax[at] % window.grid[1]].unsqueeze(-1), y[argmax[at] // window.grid[1]].unsqueeze(-1)
    return x - cx, y - cy


def _to_logits_(z: Tensor, beta: Tensor, window: Window, dx: Tensor, dy: Tensor) -> None:
    """Scores (b, r, M) become logits, in place."""
    _weigh_(z, beta, window, dx, dy)
    if window.kind == "crop":
        for d, dim in ((dx, 2), (dy, 3)):
            z.unflatten(-1, window.grid).add_(OUTSIDE * (d.abs() > window.radius).to(z.dtype).unsqueeze(dim))


def _weigh_(z: Tensor, beta: Tensor, window: Window, dx: Tensor, dy: Tensor) -> None:
    """Times the window's Gaussian, over the temperature: also what gradients of logits become those of scores by."""
    if window.kind in ("none", "crop"):
        z.mul_(beta)
        return
    wx, wy = (torch.exp(d.square() / (-2 * window.sigma**2)) for d in (dx, dy))
    z.unflatten(-1, window.grid).mul_(beta * wx.unsqueeze(2)).mul_(wy.unsqueeze(3))


def _logit_factors(grads: Grads, matches: Matches, at: Piece, z: Tensor, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """dz_j / p_j of `match_backward`, (b, r, M)."""
    along_x = along_y = z.new_zeros(1, 1, 1)
    if grads.xy is not None:
        mean, slope = matches.xy[at].unsqueeze(-2), full(grads.xy[at]).unsqueeze(-2)  # (b, r, 1, 2)
        along_x = (x - mean[..., 0]) * slope[..., 0]
        along_y = (y - mean[..., 1]) * slope[..., 1]
    if grads.lse is not None:
        along_y = along_y + full(grads.lse[at]).unsqueeze(-1)
    shape = (*z.shape[:2], y.shape[0], x.shape[0])
    torch.add(along_x.unsqueeze(2), along_y.unsqueeze(3).expand(shape), out=out.view(shape))
    if grads.entropy is not None:
        slope = full(grads.entropy[at]).unsqueeze(-1)
        out.add_(slope * (matches.lse[at] - matches.entropy[at]).unsqueeze(-1)).addcmul_(z, slope, value=-1)
    return out


def across_(grad: Tensor, x: Tensor, scale: Tensor) -> None:
    """The gradient of unit features, times 1 / |x|, loses its part along x: that changes only the length of x."""
    along = torch.einsum("bnc,bnc->bn", full(x), grad).unsqueeze(-1)
    grad.addcmul_(full(x), along * scale.square(), value=-1)


def mutual(src: Tensor, trg: Tensor, normalize: bool) -> Mutual:
    """`corrzoo.ops.mutual` without a gradient."""
    scores = Scores(src, trg, normalize)
    row_max, col_max = scores.trg.new_empty(src.shape[:2]), scores.trg.new_full(trg.shape[:2], -torch.inf)
    row_argmax, col_argmax = (torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device) for x in (src, trg))
    for strip in scores.strips:
        block = scores.multiply(scores.buffer("strip", strip), strip)
        for at, inner in scores.chunks(strip):
            s = scores.scale(block[inner], at, block[inner])
            row_max[at], row_argmax[at] = row_maxima(s)
            best, index = s.max(dim=1)
            old = col_max[at[0]]
            better = ~(best <= old) & ~old.isnan()  # earlier rows win ties, and the first NaN stays
            col_max[at[0]] = torch.where(better, best, old)
            col_argmax[at[0]] = torch.where(better, index + at[1].start, col_argmax[at[0]])
    return Mutual(row_max, row_argmax, col_max, col_argmax)


def patch_scores(src: Tensor, trg: Tensor, corner: Tensor, side: int) -> Tensor:
    """Scores (B, N, side²) of source points in squares of target cells, 0 for cells outside the target.

    Args: src (B, N, C), trg (B, h, w, C), and corner (B, N, 2) int64 (x, y), the square's top left cell.
    """
    out = src.new_empty(*src.shape[:2], side**2)
    for at in pieces(src.shape[0], range(src.shape[1]), side**2 * src.shape[2], 2**20):
        cells, inside = _patch(corner[at], side, trg)
        out[at] = torch.einsum("bnc,bnkc->bnk", src[at], _gather(trg[at[0]], cells)) * inside
    return out


def patch_scores_backward(grad: Tensor, src: Tensor, trg: Tensor, corner: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Gradients of `patch_scores` to src and trg."""
    dsrc, dtrg = torch.empty_like(src), torch.zeros_like(trg)
    for at in pieces(src.shape[0], range(src.shape[1]), side**2 * src.shape[2], 2**20):
        cells, inside = _patch(corner[at], side, trg)
        d = grad[at] * inside
        dsrc[at] = torch.einsum("bnk,bnkc->bnc", d, _gather(trg[at[0]], cells))
        index = cells.flatten(1).unsqueeze(-1).expand(-1, -1, src.shape[2])
        dtrg[at[0]].flatten(1, 2).scatter_add_(1, index, torch.einsum("bnk,bnc->bnkc", d, src[at]).flatten(1, 2))
    return dsrc, dtrg


def _patch(corner: Tensor, side: int, trg: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (b, n, side²) of a square's cells, clipped to the target, and whether they lie in it."""
    h, w = trg.shape[1:3]
    step = torch.arange(side, device=corner.device)
    x, y = (corner.unsqueeze(-2) + step.unsqueeze(-1)).unbind(-1)  # (b, n, side) each
    inside = ((x >= 0) & (x < w)).unsqueeze(-2) & ((y >= 0) & (y < h)).unsqueeze(-1)
    cells = y.clamp(0, h - 1).unsqueeze(-1) * w + x.clamp(0, w - 1).unsqueeze(-2)
    return cells.flatten(2), inside.flatten(2)


def _gather(trg: Tensor, cells: Tensor) -> Tensor:
    """(b, n, k, C): the features of cells (b, n, k) of a target (b, h, w, C)."""
    item = torch.arange(trg.shape[0], device=trg.device).view(-1, 1, 1)
    return trg.flatten(1, 2)[item, cells]
