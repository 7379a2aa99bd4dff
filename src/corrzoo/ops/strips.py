"""The loop over strips of a correlation, and its torch operators.

A correlation has a score for each of N source points and M target cells, and may not fit in memory. So a strip, some of
its rows, is computed at a time, by one matrix product (GEMM). What reduces each row of a strip to one result is called
its epilogue: `epilogue` in torch (any device), or `kernels` in Triton (CUDA). The product takes the features as they
are and sums in float32 or float64. The epilogue divides by their lengths: features of half precision would be rounded
once more if they were normalised first.
"""

import importlib.util
import os
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from corrzoo.ops.epilogue import CHUNK, Piece, Rows, row_maxima
from corrzoo.ops.reference import inverse_norm
from corrzoo.precision import full, full_precision
from corrzoo.types import ZooError

WHOLE, STRIP = 256 * 2**20, 64 * 2**20
"""On a GPU a volume of at most WHOLE bytes is one strip, a larger one is cut into strips of STRIP bytes."""
CPU_STRIP, ROWS = 2 * 2**20, 512
"""On a CPU strips have CPU_STRIP bytes, but at least ROWS rows for the GEMM's sake."""
KEEP, KEEP_HALF = 32 * 2**20, 512 * 2**20
"""Our choice: keep a volume of at most KEEP bytes for the backward, and half of a larger one, at most KEEP_HALF bytes.
Computing a score again costs a third of its backward, and large volumes are what the op avoids."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def resolve_backend(backend: str, x: Tensor) -> str:
    """Name the implementation that runs on features like x: "torch" or "triton".

    Raises:
        ZooError: if the backend is unknown or cannot run on x.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ZooError(f"unknown backend {backend!r}: choose one of auto, torch, triton")
    if backend == "torch" or (backend == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
        return "torch"
    if backend == "auto":  # the kernels are compiled for compute capability 8.0 and above
        return "triton" if HAS_TRITON and torch.cuda.get_device_capability(x.device) >= (8, 0) else "torch"
    if not HAS_TRITON:
        raise ZooError("backend='triton' needs the package triton: install it, or use backend='auto'")
    if x.dtype == torch.float64:
        raise ZooError("backend='triton' computes in float32, got float64: use backend='torch'")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ZooError(f"backend='triton' needs CUDA tensors, got {x.device}: use backend='torch' or 'auto'")
    return "triton"


def points_to_keep(src: Tensor, trg: Tensor) -> int | torch.SymInt:
    """Points of each item whose scores are kept for the backward."""
    row, points = src.shape[0] * trg.shape[1] * max(src.itemsize, 4), src.shape[1]
    return torch.sym_min(points, torch.sym_max(KEEP // row, torch.sym_min(points // 2, KEEP_HALF // row)))


def pieces(batch: int, points: range, width: int, elements: int, rows: int = 1) -> Iterator[Piece]:
    """Pieces of (batch, points, width) with at most `elements` elements, but at least `rows` rows."""
    rows, items = max(rows, elements // width), max(1, elements // (max(1, len(points)) * width))
    for b in range(0, batch, items):
        for r in range(points.start, points.stop, rows):
            yield slice(b, min(b + items, batch)), slice(r, min(r + rows, points.stop))


def strips(src: Tensor, trg: Tensor, keep: int = 0) -> list[Piece]:
    """Pieces of the volume (B, N, M), each with points on one side of point number `keep`."""
    (B, N, _), M, size = src.shape, trg.shape[1], full(src[:0]).itemsize
    strip, rows = (WHOLE if B * N * M * size <= WHOLE else STRIP, 1) if src.is_cuda else (CPU_STRIP, ROWS)
    return [at for half in (range(keep), range(keep, N)) for at in pieces(B, half, M, strip // size, rows)]


def chunks(at: Piece, block: Tensor) -> Iterator[tuple[Piece, Piece]]:
    """Pieces of a strip (b, r, M) that fit a core's cache: where they are in the batch, and where in the strip."""
    b, r, size = at[0].start, at[1].start, CHUNK.get(block.device.type, block.numel())
    for i, j in pieces(block.shape[0], range(block.shape[1]), block.shape[2], size):
        yield (slice(b + i.start, b + i.stop), slice(r + j.start, r + j.stop)), (i, j)


def room(strips: list[Piece], trg: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the largest of the strips. Allocating each anew costs 3 % at 128² on a CPU."""
    rows = max(((b.stop - b.start) * (r.stop - r.start) for b, r in strips), default=0)
    return trg.new_empty(rows * trg.shape[1], dtype=dtype)


def fit(memory: Tensor, at: Piece, cells: int) -> Tensor:
    """A strip (b, r, M) in that memory."""
    b, r = (points.stop - points.start for points in at)
    return memory[: b * r * cells].view(b, r, cells)


def multiply(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write x @ y (b, n, m) to `out`, or `add` it, summed in the dtype of `out`."""
    if x.is_cuda and x.dtype != out.dtype:
        product = partial(torch.bmm, x, y.to(x.dtype), out_dtype=out.dtype)
        return out.add_(product()) if add else product(out=out)
    x, y = x.to(out.dtype), y.to(out.dtype)
    return out.baddbmm_(x, y) if add else torch.bmm(x, y, out=out)


def _forward(
    src: Tensor, trg: Tensor, temperature: Tensor, corner: Tensor | None, kind: str, h: int, w: int, extent: float,
    normalize: bool, backend: str, keep: int,
) -> Six:  # fmt: skip
    """The results in `Rows`, and the products or logits (B, keep, M) of the first points."""
    values, argmax, lse, a, b, kept = _new(src, trg, kind, extent, keep)
    rows = Rows(kind, (h, w), extent, temperature, corner, values, argmax, lse, a, b)
    run = _epilogue(backend, src, kind)
    trg, todo = trg if src.is_cuda else full(trg), strips(src, trg, keep)
    memory = room([at for at in todo if at[1].stop > keep], trg, kept.dtype)
    with full_precision(src):
        if normalize:
            run.inverse_norms(src, trg, rows)
        else:
            a.fill_(1), b.fill_(1)
        for at in todo:
            block = kept[at] if at[1].stop <= keep else fit(memory, at, b.shape[1])
            multiply(src[at], trg[at[0]].mT, block)
            for part, inner in chunks(at, block):
                run.read_out(block[inner], part, rows)
    return values, argmax, lse, a, b, kept


def _backward(
    grad: Tensor, src: Tensor, trg: Tensor, temperature: Tensor, corner: Tensor | None,
    values: Tensor, argmax: Tensor, lse: Tensor, a: Tensor, b: Tensor, kept: Tensor,
    kind: str, h: int, w: int, extent: float, normalize: bool, backend: str, keep: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of src, trg and temperature; an empty tensor for each that is not needed."""
    rows = Rows(kind, (h, w), extent, temperature, corner, values, argmax, lse, a, b)
    run, features, scales = _epilogue(backend, src, kind), (src, trg), (a, b)
    grads = [kept.new_empty(x.shape) if need else None for x, need in zip(features, needs, strict=False)]
    dtemperature = torch.zeros_like(temperature)
    # For half precision the GEMMs on a GPU multiply bfloat16: it has the range that these gradients need.
    half = src.itemsize == 2 and resolve_backend(backend, src) == "triton"
    dtype = torch.bfloat16 if half else kept.dtype
    cells, todo = trg if src.is_cuda else full(trg), strips(src, trg, keep)
    memory = room(todo, trg, dtype)
    other = memory if dtype == kept.dtype else room([at for at in todo if at[1].stop > keep], trg, kept.dtype)
    with full_precision(src):
        for at in todo:
            known, d = at[1].stop <= keep, fit(memory, at, b.shape[1])
            block = kept[at] if known else fit(other, at, b.shape[1])
            if not known and kind != "square":
                multiply(src[at], cells[at[0]].mT, block)
            for part, inner in chunks(at, block):
                moment = run.score_gradients(block[inner], part, rows, grad, d[inner], known, needs[2])
                if needs[2]:
                    dtemperature -= moment / temperature
            if grads[0] is not None:
                multiply(d, cells[at[0]], grads[0][at])
            if grads[1] is not None:
                multiply(d.mT, src[at], grads[1][at[0]], add=at[1].start > 0)
        for i, (x, scale) in enumerate(zip(features, scales, strict=True)):
            if normalize and grads[i] is not None:
                grads[i] = run.across(grads[i], x, scale)
    dsrc, dtrg = (x.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(grads, features, strict=True))
    return dsrc, dtrg, dtemperature if needs[2] else dtemperature.new_empty(0)


def _epilogue(backend: str, x: Tensor, kind: str) -> ModuleType:
    # triton is imported only when it runs
    name = "epilogue" if resolve_backend(backend, x) == "torch" or kind == "square" else "kernels"
    return importlib.import_module(f"corrzoo.ops.{name}")


def _new(src: Tensor, trg: Tensor, kind: str, extent: float, keep: int) -> Six:
    """Memory for the results of `_forward`."""
    (B, N, _), M, x, square = src.shape, trg.shape[1], full(src[..., :0]), kind == "square"
    values, lse = x.new_empty(B, N, int(extent) ** 2 if square else 2), x.new_empty(B, 0 if square else N)
    argmax = torch.empty_like(lse, dtype=torch.int64)
    return values, argmax, lse, x.new_empty(B, N), x.new_empty(B, M), x.new_empty(B, keep, M)


_operator = custom_op("corrzoo::rows", _forward, mutates_args=())
_operator_backward = custom_op("corrzoo::rows_backward", _backward, mutates_args=())


@_operator.register_fake
def _(src: Tensor, trg: Tensor, temperature: Tensor, corner: Tensor | None, *options: Any) -> Six:
    return _new(src, trg, options[0], options[3], options[-1])


@_operator_backward.register_fake
def _(grad: Tensor, src: Tensor, trg: Tensor, temperature: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = zip((src, trg, temperature), args[-1], strict=True)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros as large as what is kept
    ctx.options = inputs[4:]


def _gradients(backward: Any, ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (4 + len(ctx.options))
    needs = list(ctx.needs_input_grad[:3])
    grads = backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, *(None for _ in ctx.options)


_operator.register_autograd(partial(_gradients, _operator_backward), setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The same without the operator's host time, which is three times a Function's."""

    forward, setup_context = staticmethod(_forward), staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # with create_graph: the operator, which has no second derivatives and says so
        return _gradients(_operator_backward if torch.is_grad_enabled() else _backward, ctx, *grads)


def rows(src: Tensor, trg: Tensor, temperature: Tensor | float, corner: Tensor | None, *options: Any) -> Six:
    """`_forward` with gradients to src, trg and temperature: an operator while torch.compile or torch.export traces."""
    dtype = torch.promote_types(src.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(src.device, dtype)
    else:
        temperature = src.new_full((), temperature, dtype=dtype)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (src, trg, temperature))
    keep = points_to_keep(src, trg) if recorded and options[0] != "square" else 0
    run: Any = _operator if torch.compiler.is_compiling() else _Eager.apply if recorded else _forward
    return run(src, trg, temperature, corner, *options, keep)


def _mutual(src: Tensor, trg: Tensor, normalize: bool) -> Four:
    """The fields of `corrzoo.ops.Mutual`, without gradients."""
    row_max, row_argmax, col_max, col_argmax = found = _new_mutual(src, trg)
    with full_precision(src):
        a, b = (inverse_norm(x) for x in (src, trg)) if normalize else (None, None)
        cells, todo = trg if src.is_cuda else full(trg), strips(src, trg)
        memory = room(todo, trg, row_max.dtype)
        for strip in todo:
            block = multiply(src[strip], cells[strip[0]].mT, fit(memory, strip, trg.shape[1]))
            for at, inner in chunks(strip, block):
                s = block[inner]
                if a is not None and b is not None:
                    s.mul_(b[at[0]].unsqueeze(1)).mul_(a[at].unsqueeze(2))
                row_max[at], row_argmax[at] = row_maxima(s)
                best, index = s.max(dim=1)
                old = col_max[at[0]]
                better = ~(best <= old) & ~old.isnan()  # earlier rows win ties, and the first NaN stays
                col_max[at[0]] = torch.where(better, best, old)
                col_argmax[at[0]] = torch.where(better, index + at[1].start, col_argmax[at[0]])
    return found


def _new_mutual(src: Tensor, trg: Tensor, *_: Any) -> Four:
    rows, cols = (full(x[..., 0]).new_full(x.shape[:2], -torch.inf) for x in (src, trg))
    return rows, torch.zeros_like(rows, dtype=torch.int64), cols, torch.zeros_like(cols, dtype=torch.int64)


_mutual_operator = custom_op("corrzoo::mutual", _mutual, mutates_args=())
_mutual_operator.register_fake(_new_mutual)


def mutual(src: Tensor, trg: Tensor, normalize: bool) -> Four:
    """`_mutual`, as an operator while torch.compile or torch.export traces."""
    return (_mutual_operator if torch.compiler.is_compiling() else _mutual)(src, trg, normalize)
