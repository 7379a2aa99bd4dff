"""`match`, `mutual` and `local_correlation` in strips against the reference, and as torch operators."""

import subprocess
import sys

import pytest
import torch
from problems import WINDOWS, assert_close, integers, naive, problem, run
from torch import Tensor
from torch.export import Dim
from torch.library import opcheck

from corrzoo import ops
from corrzoo.ops import library, reference, streaming
from corrzoo.types import ZooError

GRID = (4, 5)


def small(monkeypatch: pytest.MonkeyPatch, strip: int, chunk: int) -> None:
    """Strips and chunks of so many scores, of which a test's problem then has several."""
    for name, size in (("STRIP", {"cpu": strip}), ("CHUNK", {"cpu": chunk}), ("ROWS", 1)):
        monkeypatch.setattr(streaming.Scores, name, size)


@pytest.fixture(params=[(2**19, 2**18), (100, 47), (300, 150)], ids=["one strip", "rows", "items"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, *request.param)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("recompute", [True, False, "auto"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_match_and_its_gradients_equal_the_reference(window: str, normalize: bool, recompute: bool | str) -> None:
    options = {"window": window, "sigma": 1.3, "radius": 1, "normalize": normalize}
    inputs = problem(7, GRID, 6, B=3, dtype=torch.float64, window=window)

    def mine(src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor | None) -> ops.Matches:
        return ops.match(src, trg, GRID, temperature, centre=centre, recompute=recompute, **options)

    assert_close(run(mine, inputs), run(lambda s, t, T, c: naive(s, t, GRID, T, c, **options), inputs), 1e-11)


@pytest.mark.parametrize("keep", [0, 3, 7])
def test_a_part_of_the_logits_may_be_kept(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.functional, "_points_to_keep", lambda *_: keep)
    small(monkeypatch, 100, 50)
    inputs = problem(7, GRID, 6, dtype=torch.float64, window="argmax")
    options = {"window": "argmax", "sigma": 2.0}
    mine = run(lambda s, t, T, c: ops.match(s, t, GRID, T, **options), inputs)
    assert_close(mine, run(lambda s, t, T, c: naive(s, t, GRID, T, c, **options), inputs), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", WINDOWS)
def test_half_precision_features_are_computed_in_float32(window: str, dtype: torch.dtype) -> None:
    inputs = problem(9, (6, 7), 40, dtype=dtype, window=window)
    options = {"window": window, "sigma": 2.0, "radius": 1}
    mine = run(lambda s, t, T, c: ops.match(s, t, (6, 7), T, centre=c, **options), inputs)
    exact = run(lambda s, t, T, c: naive(s, t, (6, 7), T, c, **options), inputs, torch.float64)
    assert mine[0].dtype == torch.float32 and mine[5].dtype == dtype
    assert_close(mine[:5], exact[:5], 5e-6, floor=1.0)
    assert_close(mine[5:], exact[5:], {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype])


def test_gradcheck() -> None:
    src, trg, temperature, centre = (x.requires_grad_() for x in problem(3, (3, 4), 5, 1, torch.float64))

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = ops.match(inputs[0], inputs[1], (3, 4), inputs[2], window="given", sigma=1.5, centre=inputs[3])
        return out.xy, out.max, out.lse, out.entropy

    assert torch.autograd.gradcheck(function, (src, trg, temperature, centre))
    maps = trg.detach().mT.unflatten(2, (3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t, c: ops.local_correlation(s, t, c, 1), (src, maps, centre))
    assert torch.autograd.gradcheck(lambda s, t: ops.mutual(s, t)[::2], (src, trg))


def test_operators_pass_opcheck() -> None:
    src, trg, temperature, centre = (x.requires_grad_() for x in problem(5, GRID, 6))
    for window in WINDOWS:
        given = centre if window == "given" else None
        opcheck(library.match, (src, trg, temperature, given, *GRID, window, 1.0, 1, True, 3, "torch"))
    opcheck(library.mutual, (src.detach(), trg.detach(), True, "torch"))
    maps, corner = trg.detach().unflatten(1, GRID).requires_grad_(), torch.tensor([-1, 2]).expand(2, 5, 2)
    opcheck(library.patch_scores, (src, maps, corner.contiguous(), 3, "torch"))


def twice(src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor) -> Tensor:
    """Every function in one graph, `match` twice: the second around the answer of the first."""
    first = ops.match(src, trg, GRID, temperature, window="given", sigma=1.0, centre=centre)
    second = ops.match(src, trg, GRID, temperature, window="given", sigma=2.0, centre=first.xy)
    local = ops.local_correlation(src, trg.mT.unflatten(2, GRID), second.xy, 1)
    return torch.stack([first.entropy.sum(), second.xy.sum(), local.sum(), ops.mutual(src, trg).row_max.sum()])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    inputs = problem(5, GRID, 6)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_close(run(compiled, inputs), run(twice, inputs), 1e-6)


def test_double_use_in_one_graph_equals_the_reference() -> None:
    def plain(src: Tensor, trg: Tensor, temperature: Tensor, centre: Tensor) -> Tensor:
        first = naive(src, trg, GRID, temperature, centre, window="given", sigma=1.0)
        second = naive(src, trg, GRID, temperature, first.xy, window="given", sigma=2.0)
        local = reference.local_correlation(src, trg.mT.unflatten(2, GRID), second.xy, 1)
        return torch.stack([first.entropy.sum(), second.xy.sum(), local.sum(), reference.mutual(src, trg)[0].sum()])

    inputs = problem(5, GRID, 6, dtype=torch.float64)
    assert_close(run(twice, inputs), run(plain, inputs), 1e-12)


def test_exports_with_dynamic_sizes() -> None:
    class Head(torch.nn.Module):
        def forward(self, src: Tensor, trg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            f, g = src.flatten(2).mT, trg.flatten(2).mT
            out = ops.match(f, g, (trg.shape[2], trg.shape[3]), 0.1, window="argmax", sigma=2.0)
            return out.xy, ops.mutual(f, g).col_argmax, ops.local_correlation(f, trg, out.xy, 1)

    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    traced = (torch.randn(2, 6, 5, 7), torch.randn(2, 6, 4, 9))
    exported = torch.export.export(Head(), traced, dynamic_shapes={"src": sizes, "trg": sizes})
    other = (torch.randn(3, 6, 8, 3), torch.randn(3, 6, 6, 5))
    torch.testing.assert_close(exported.module()(*other), Head()(*other))


def test_autocast_changes_nothing() -> None:
    inputs = problem(5, GRID, 6)

    def within(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return twice(*tensors)

    assert_close(run(within, inputs), run(twice, inputs), 0)
    scores = reference.correlation(*inputs[:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.correlation(*inputs[:2]), scores)
        out = ops.readout(scores, GRID, 0.02)
    assert torch.equal(out.xy, reference.readout(scores, GRID, 0.02).xy)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("normalize", [True, False])
def test_mutual_and_local_correlation_equal_the_reference(normalize: bool) -> None:
    src, trg, _, centre = problem(7, GRID, 6, dtype=torch.float64)
    mine = run(lambda s, t: ops.mutual(s, t, normalize), (src, trg))
    assert_close(mine, run(lambda s, t: reference.mutual(s, t, normalize), (src, trg)), 1e-12)
    inputs = (src, trg.mT.unflatten(2, GRID), centre * 2 - 2)  # many lie outside
    mine = run(lambda s, t, c: ops.local_correlation(s, t, c, 2, normalize), inputs)
    assert_close(mine, run(lambda s, t, c: reference.local_correlation(s, t, c, 2, normalize), inputs), 1e-12)


@pytest.mark.parametrize("cells", [20, 128])
def test_row_maxima_are_the_first(cells: int) -> None:
    x = torch.randint(0, 9, (2, 50, cells), generator=torch.Generator().manual_seed(0)).float()
    x[0, 3, 100 % cells] = x[0, 3, 7] = torch.nan
    for mine, plain in zip(streaming.row_maxima(x), x.max(-1), strict=True):
        torch.testing.assert_close(mine, plain, equal_nan=True)


@pytest.mark.usefixtures("room")
def test_ties_go_to_the_lowest_index() -> None:
    src, trg, temperature, _ = integers(9, GRID, 6)  # sums of small integers are exact in any order: true ties
    out, plain = ops.mutual(src, trg, normalize=False), reference.mutual(src, trg, normalize=False)
    assert torch.equal(out.row_argmax, plain.row_argmax) and torch.equal(out.col_argmax, plain.col_argmax)
    assert torch.equal(ops.match(src, trg, GRID, temperature, normalize=False).argmax, plain.row_argmax)
    assert ops.match(torch.zeros_like(src), trg, GRID, 0.1).argmax.max() == 0


def test_nan_propagates_as_in_the_reference() -> None:
    src, trg, temperature, _ = problem(5, GRID, 6)
    src[0, 2, 3] = torch.nan
    for window in ("none", "argmax", "crop"):
        options = {"window": window, "sigma": 1.0, "radius": 1}
        mine = ops.match(src, trg, GRID, temperature, **options)
        plain = naive(src, trg, GRID, temperature, None, **options)
        torch.testing.assert_close(mine, plain, equal_nan=True)
    torch.testing.assert_close(ops.mutual(src, trg), reference.mutual(src, trg), equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src": torch.zeros(2, 3)}, r"expected src of shape \(B, points, C\)"),
        ({"src": torch.zeros(2, 0, 6)}, "nothing empty"),
        ({"src": torch.zeros(2, 3, 5)}, "must agree in the batch and in C"),
        ({"src": torch.zeros(2, 3, 6, dtype=torch.float64)}, "must agree"),
        ({"src": torch.zeros(2, 3, 6, dtype=torch.int64)}, "floating"),
        ({"trg_grid": (3, 5)}, "as many cells as the target: 20"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.ones(2)}, "0-d tensor"),
        ({"window": "agmax"}, "did you mean 'argmax'"),
        ({"window": "argmax"}, "needs sigma"),
        ({"window": "argmax", "sigma": -1.0}, "sigma must be positive"),
        ({"window": "crop"}, "needs radius"),
        ({"window": "crop", "radius": 1.5}, "radius must be a whole number"),
        ({"window": "given", "sigma": 1.0}, "needs centre"),
        ({"window": "given", "sigma": 1.0, "centre": torch.zeros(2, 4, 2)}, "centre of shape"),
        ({"recompute": "never"}, "True, False or 'auto'"),
        ({"backend": "cuda"}, "choose one of auto, torch, triton"),
        ({"backend": "triton"}, "needs CUDA tensors"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"src": torch.zeros(2, 3, 6), "trg": torch.zeros(2, 20, 6), "trg_grid": GRID, "temperature": 0.1}
    with pytest.raises(ZooError, match=message) as error:
        ops.match(**{**arguments, **change})
    assert "\n" not in str(error.value)


def test_imports_with_torch_alone() -> None:
    """No triton before it is asked for, and none of the zoo's other dependencies at all."""
    others = ("triton", "lightning", "timm", "einops", "torchmetrics", "scipy", "PIL", "jsonargparse")
    code = (
        "import torch, sys; before = set(sys.modules); import corrzoo.ops;"
        f"print([m for m in set(sys.modules) - before if m.split('.')[0] in {others}])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
