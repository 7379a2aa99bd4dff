"""The loop: strips of rows of the correlation, each one library GEMM and an epilogue; and its torch operators.

A strip holds products <f_i, g_j> of the features as they are, summed in full precision. The epilogue applies the norms,
so that half-precision features lose nothing by normalisation. It is `epilogue` (torch, any device) or `kernels`
(Triton, CUDA).
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from corrzoo.ops import epilogue
from corrzoo.ops.epilogue import CHUNK, Piece, Reduction, Rows
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
Three, Four = tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]
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


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a function of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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


def chunks(at: Piece, block: Tensor) -> Iterator[tuple[Piece, Piece]]:
    """Pieces of a strip (b, r, M) that fit a core's cache: where they are in the batch, and where in the strip."""
    b, r, size = at[0].start, at[1].start, CHUNK.get(block.device.type, block.numel())
    for i, j in pieces(block.shape[0], range(block.shape[1]), block.shape[2], size):
        yield (slice(b + i.start, b + i.stop), slice(r + j.start, r + j.stop)), (i, j)


def multiply(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write x @ y (b, n, m) to `out`, or `add` it, summed in the dtype of `out`."""
    if x.is_cuda and x.dtype != out.dtype:
        product = partial(torch.bmm, x, y.to(x.dtype), out_dtype=out.dtype)
        return out.add_(product()) if add else product(out=out)
    x, y = x.to(out.dtype), y.to(out.dtype)
    return out.baddbmm_(x, y) if add else torch.bmm(x, y, out=out)


class Products:
    """Strips of the products <f_i, g_j> of src (B, N, C) and trg (B, M, C), and the gradients of both features.

    No strip has points on both sides of point number `keep`.
    """

    def __init__(self, src: Tensor, trg: Tensor, memory: int = 0, keep: int = 0) -> None:
        self.src, self.trg, self.keep = src, trg if src.is_cuda else full(trg), keep
        (B, N, _), M = src.shape, trg.shape[1]
        self.dtype = torch.promote_types(src.dtype, torch.float32)
        size, rows = memory, 1
        if not memory and src.is_cuda:
            size = WHOLE if B * N * M * self.dtype.itemsize <= WHOLE else STRIP
        elif not memory:
            size, rows = CPU_STRIP, ROWS
        size //= self.dtype.itemsize
        self.strips = [at for half in (range(keep), range(keep, N)) for at in pieces(B, half, M, size, rows)]
        self._buffers: dict[torch.dtype, Tensor] = {}

    def buffer(self, at: Piece, dtype: torch.dtype) -> Tensor:
        """Memory (b, r, M) for a strip, the same for every strip."""
        shape = (at[0].stop - at[0].start, at[1].stop - at[1].start, self.trg.shape[1])
        size = shape[0] * shape[1] * shape[2]
        if dtype not in self._buffers or self._buffers[dtype].numel() < size:
            self._buffers[dtype] = self.src.new_empty(size, dtype=dtype)
        return self._buffers[dtype][:size].view(shape)

    def fill(self, at: Piece, block: Tensor) -> Tensor:
        """Compute the products of a strip."""
        return multiply(self.src[at], self.trg[at[0]].mT, block)

    def gradients(self, strips: Iterable[tuple[Piece, Tensor]], needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of src and trg in full precision, where needed, from those of the products of every strip."""
        pairs = zip((self.src, self.trg), needs, strict=True)
        dsrc, dtrg = (x.new_empty(x.shape, dtype=self.dtype) if need else None for x, need in pairs)
        for at, d in strips:
            if dsrc is not None:
                multiply(d, self.trg[at[0]], dsrc[at])
            if dtrg is not None:
                multiply(d.mT, self.src[at], dtrg[at[0]], add=at[1].start > 0)
        return [dsrc, dtrg]


def _forward(
    src: Tensor, trg: Tensor, temperature: Tensor | None, corner: Tensor | None, value: float, kind: str,
    h: int, w: int, extent: float, normalize: bool, memory: int, keep: int, backend: str,
) -> Six:  # fmt: skip
    """The fields of `Rows`, and the products or logits (B, keep, M) of the first points. T is `value` without a tensor."""
    e, how = _epilogue(backend, src, kind), _reduction(temperature, corner, value, kind, h, w, extent)
    products, (*results, kept) = Products(src, trg, memory, keep), _new(src, trg, kind, extent, keep)
    with full_precision(src):
        if normalize:
            results[3:] = e.inverse_norms(src, trg)
        for at in products.strips:
            block = products.fill(at, kept[at] if at[1].stop <= keep else products.buffer(at, kept.dtype))
            for chunk, inner in chunks(at, block):
                e.read_out(block[inner], chunk, how, Rows(*results))
    return *results, kept


def _backward(
    grad: Tensor, src: Tensor, trg: Tensor, temperature: Tensor | None, corner: Tensor | None,
    values: Tensor, argmax: Tensor, lse: Tensor, a: Tensor, b: Tensor, kept: Tensor, value: float, kind: str,
    h: int, w: int, extent: float, normalize: bool, memory: int, keep: int, backend: str, needs: list[bool],
) -> Three:  # fmt: skip
    """Gradients of src, trg and temperature; an empty tensor for each that is not needed."""
    e, how = _epilogue(backend, src, kind), _reduction(temperature, corner, value, kind, h, w, extent)
    products, rows, moments = Products(src, trg, memory, keep), Rows(values, argmax, lse, a, b), []

    def strips() -> Iterator[tuple[Piece, Tensor]]:
        dtype = e.gradient_dtype(src.dtype)
        for at in products.strips:
            known = at[1].stop <= keep
            block = kept[at] if known else products.buffer(at, kept.dtype)
            if not known and kind != "square":
                products.fill(at, block)
            d = block if dtype == block.dtype and not known else products.buffer(at, dtype)
            for chunk, inner in chunks(at, block):
                moments.append(e.score_gradients(block[inner], chunk, how, rows, grad, d[inner], known, needs[2]))
            yield at, d

    with full_precision(src):
        grads = products.gradients(strips(), needs[:2])
        grads = e.across(grads, (src, trg), (a, b)) if normalize else grads
        grads.append(reduce(torch.add, moments) if needs[2] else None)
    pairs = zip(grads, (src, trg, temperature), strict=True)
    return tuple(src.new_empty(0) if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def _epilogue(backend: str, x: Tensor, kind: str) -> Any:
    # triton is imported only when it runs
    name = "epilogue" if resolve_backend(backend, x) == "torch" or kind == "square" else "kernels"
    return importlib.import_module(f"corrzoo.ops.{name}")


def _reduction(
    temperature: Tensor | None, corner: Tensor | None, value: float, kind: str, h: int, w: int, extent: float
) -> Reduction:
    return Reduction(kind, (h, w), extent, value if temperature is None else full(temperature), corner)


def _new(src: Tensor, trg: Tensor, kind: str, extent: float, keep: int) -> Six:
    """Memory for the results of `_forward`; the norms are ones."""
    (B, N, _), M, x = src.shape, trg.shape[1], full(src[..., :0])
    values = x.new_empty(B, N, int(extent) ** 2 if kind == "square" else 2)
    lse, a, b, kept = x.new_empty(B, N), x.new_ones(B, N), x.new_ones(B, M), x.new_empty(B, keep, M)
    return values, torch.empty_like(lse, dtype=torch.int64), lse, a, b, kept


_operator = custom_op("corrzoo::rows", _forward, mutates_args=())
_operator_backward = custom_op("corrzoo::rows_backward", _backward, mutates_args=())


@_operator.register_fake
def _(src: Tensor, trg: Tensor, temperature: Tensor | None, corner: Tensor | None, *options: Any) -> Six:
    return _new(src, trg, options[1], options[4], options[7])


@_operator_backward.register_fake
def _(grad: Tensor, src: Tensor, trg: Tensor, temperature: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    pairs = zip((src, trg, temperature), args[-1], strict=False)
    return tuple(src.new_empty(0) if x is None or not need else x.new_empty(x.shape) for x, need in pairs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[4:]


def _gradients(backward: Callable, ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, *(None for _ in ctx.options)


_operator.register_autograd(partial(_gradients, _operator_backward), setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The same without the operator's host time, which is three times a Function's."""

    forward, setup_context = staticmethod(_forward), staticmethod(_setup)
    backward = staticmethod(once_differentiable(partial(_gradients, _backward)))


def rows(src: Tensor, trg: Tensor, temperature: Tensor | None, corner: Tensor | None, *options: Any) -> Six:
    """`_forward` with gradients to src, trg and temperature: an operator while torch.compile or torch.export traces."""
    tensors = (src, trg, temperature, corner)
    if torch.compiler.is_compiling():
        return _operator(*tensors, *options)
    return _Eager.apply(*tensors, *options) if wants_gradient(*tensors) else _forward(*tensors, *options)


def _mutual(src: Tensor, trg: Tensor, normalize: bool) -> Four:
    """The fields of `corrzoo.ops.Mutual`, without gradients."""
    products, (row_max, row_argmax, col_max, col_argmax) = Products(src, trg), _new_mutual(src, trg)
    with full_precision(src):
        a, b = epilogue.inverse_norms(src, trg)
        for at in products.strips:
            s = products.fill(at, products.buffer(at, products.dtype))
            if normalize:
                s.mul_(b[at[0]].unsqueeze(1)).mul_(a[at].unsqueeze(2))
            row_max[at], row_argmax[at] = epilogue.row_maxima(s)
            best, index = s.max(dim=1)
            old = col_max[at[0]]
            better = ~(best <= old) & ~old.isnan()  # earlier rows win ties, and the first NaN stays
            col_max[at[0]] = torch.where(better, best, old)
            col_argmax[at[0]] = torch.where(better, index + at[1].start, col_argmax[at[0]])
    return row_max, row_argmax, col_max, col_argmax


def _new_mutual(src: Tensor, trg: Tensor, *_: Any) -> Four:
    rows, cols = (full(x[..., 0]).new_full(x.shape[:2], -torch.inf) for x in (src, trg))
    return rows, torch.zeros_like(rows, dtype=torch.int64), cols, torch.zeros_like(cols, dtype=torch.int64)


_mutual_operator = custom_op("corrzoo::mutual", _mutual, mutates_args=())
_mutual_operator.register_fake(_new_mutual)


def mutual(src: Tensor, trg: Tensor, normalize: bool) -> Four:
    """`_mutual`, as an operator while torch.compile or torch.export traces."""
    return (_mutual_operator if torch.compiler.is_compiling() else _mutual)(src, trg, normalize)
