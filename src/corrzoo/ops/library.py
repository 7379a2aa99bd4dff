"""The fast implementations as torch operators: shapes for tracing, gradients, and the choice between them.

The operators are opaque to torch.compile and torch.export. `match` differentiates all its floating outputs, `mutual`
gives indices (its caller reads the scores there), `patch_scores` is what remains of the local correlation when the
bilinear weights are taken outside. `streaming` says what each computes.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from corrzoo.ops import streaming
from corrzoo.ops.reference import Matches
from corrzoo.ops.streaming import Grads, Window
from corrzoo.precision import full, full_precision

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _of(backend: str) -> ModuleType:
    # triton is imported only when it is used
    return streaming if backend == "torch" else importlib.import_module("corrzoo.ops.launch")


@custom_op("corrzoo::match", mutates_args=())
def match(
    src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor | None, h: int, w: int, window: str, sigma: float,
    radius: int, normalize: bool, keep: int, backend: str,
) -> Six:  # fmt: skip
    """The fields of `Matches`, and the logits (B, keep, M) that the backward need not compute again."""
    to = Window((h, w), window, sigma, radius)
    with full_precision(src):
        matches, kept = _of(backend).match(src, trg, temperature, centre, to, normalize, keep)
    return *matches, kept


@match.register_fake
def _(src: Tensor, trg: Tensor, *args: Any) -> tuple[Tensor, ...]:
    (B, N, _), M, keep, like = src.shape, trg.shape[1], args[-2], full(src)
    best, lse, entropy = (like.new_empty(B, N) for _ in range(3))
    return (
        like.new_empty(B, N, 2),
        best,
        best.new_empty(B, N, dtype=torch.int64),
        lse,
        entropy,
        like.new_empty(B, keep, M),
    )


@custom_op("corrzoo::match_backward", mutates_args=())
def match_backward(
    dxy: Tensor | None, dmax: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None,
    src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor | None,
    xy: Tensor, best: Tensor, argmax: Tensor, lse: Tensor, entropy: Tensor, kept: Tensor,
    h: int, w: int, window: str, sigma: float, radius: int, normalize: bool, backend: str, needs: list[bool],
) -> Four:  # fmt: skip
    """Gradients to src, trg, temperature and centre; an empty tensor for what `needs` does not name."""
    grads, matches = Grads(dxy, dmax, dlse, dentropy), Matches(xy, best, argmax, lse, entropy)
    to = Window((h, w), window, sigma, radius)
    with full_precision(src):
        return _of(backend).match_backward(grads, src, trg, temperature, centre, matches, kept, to, normalize, needs)


@match_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    src, trg, xy, needs = args[4], args[5], args[8], args[-1]
    outputs = (torch.empty_like(src), torch.empty_like(trg), xy.new_empty(()), torch.empty_like(xy))
    return tuple(x if need else x.new_empty(0) for x, need in zip(outputs, needs, strict=True))


def _match_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.mark_non_differentiable(output[2], output[5])
    ctx.set_materialize_grads(False)
    ctx.options = (*inputs[4:10], inputs[11])


def _match_autograd(ctx: Any, dxy: Any, dmax: Any, _: Any, dlse: Any, dentropy: Any, __: Any) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:4])
    grads = match_backward(dxy, dmax, dlse, dentropy, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 8


match.register_autograd(_match_autograd, setup_context=_match_setup)


@custom_op("corrzoo::mutual", mutates_args=())
def mutual(src: Tensor, trg: Tensor, normalize: bool, backend: str) -> Four:
    """The fields of `Mutual`."""
    with full_precision(src):
        return tuple(_of(backend).mutual(src, trg, normalize))


@mutual.register_fake
def _(src: Tensor, trg: Tensor, normalize: bool, backend: str) -> tuple[Tensor, ...]:
    rows, cols = (full(x).new_empty(x.shape[:2]) for x in (src, trg))
    return rows, rows.long(), cols, cols.long()


@custom_op("corrzoo::patch_scores", mutates_args=())
def patch_scores(src: Tensor, trg: Tensor, corner: Tensor, side: int, backend: str) -> Tensor:
    """(B, N, side²)."""
    with full_precision(src):
        return _of(backend).patch_scores(src, trg, corner, side)


@patch_scores.register_fake
def _(src: Tensor, trg: Tensor, corner: Tensor, side: int, backend: str) -> Tensor:
    return src.new_empty(*src.shape[:2], side**2)


@custom_op("corrzoo::patch_scores_backward", mutates_args=())
def patch_scores_backward(
    grad: Tensor, src: Tensor, trg: Tensor, corner: Tensor, side: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients to src and trg."""
    with full_precision(src):
        return _of(backend).patch_scores_backward(grad, src, trg, corner, side)


@patch_scores_backward.register_fake
def _(grad: Tensor, src: Tensor, trg: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(src), torch.empty_like(trg)


def _patch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _patch_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *patch_scores_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


patch_scores.register_autograd(_patch_autograd, setup_context=_patch_setup)
