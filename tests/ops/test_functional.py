"""The public functions as torch operators: gradients, tracing, capture, no host work, and errors."""

import subprocess
import sys

import pytest
import torch
from problems import WINDOWS, assert_close, centres, integers, naive, problem, run
from torch import Tensor
from torch.export import Dim
from torch.library import opcheck

from conftest import Place
from corrzoo import ops
from corrzoo.ops import reference, strips
from corrzoo.types import ZooError
from hostless import hostless

GRID = (4, 5)


def everything(backend: str = "auto"):
    """Every function in one graph, `match` twice and `local_correlation` around its result."""

    def function(src: Tensor, trg: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        first = ops.match(src, trg, GRID, temperature, "argmax", sigma=1.0, backend=backend).xy
        second = ops.match(src.sin(), trg, GRID, temperature, "crop", radius=1, backend=backend).xy
        third = ops.readout(ops.correlation(src, trg), GRID, temperature)
        local = ops.local_correlation(src, trg.mT.unflatten(2, GRID), first, 1)
        return first, second, third.xy, third.argmax, local, *ops.mutual(src, trg)

    return function


def everything_naive(src: Tensor, trg: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    first = naive(src, trg, GRID, temperature, window="argmax", sigma=1.0).xy
    second = naive(src.sin(), trg, GRID, temperature, window="crop", radius=1).xy
    third = naive(src, trg, GRID, temperature)
    local = reference.local_correlation(src, trg.mT.unflatten(2, GRID), first, 1)
    return first, second, third.xy, third.argmax, local, *reference.mutual(src, trg)


def precision(where: Place) -> tuple[torch.dtype, float]:
    """What a backend computes these tests in, and how far two ways of computing may lie apart."""
    return (torch.float64, 1e-12) if where.backend == "torch" else (torch.float32, 2e-5)


def test_all_functions_in_one_graph_equal_the_reference(where: Place) -> None:
    dtype, tolerance = precision(where)
    inputs = problem(5, GRID, 6, dtype=dtype)
    exact = run(everything_naive, inputs, torch.float64)
    assert_close(run(everything(where.backend), inputs, device=where.device), exact, tolerance)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(where: Place, dynamic: bool) -> None:
    dtype, tolerance = precision(where)
    inputs = problem(5, GRID, 6, dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(everything(where.backend), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = run(everything(where.backend), inputs, device=where.device)
    assert_close(run(compiled, inputs, device=where.device), eager, tolerance)


def test_exports_with_dynamic_sizes(where: Place) -> None:
    class Head(torch.nn.Module):
        def forward(self, src: Tensor, trg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            f, g = src.flatten(2).mT, trg.flatten(2).mT
            out = ops.match(f, g, (trg.shape[2], trg.shape[3]), 0.1, "argmax", 2.0, backend=where.backend)
            return out.xy, ops.mutual(f, g).col_argmax, ops.local_correlation(f, trg, out.xy, 1)

    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    traced = tuple(torch.randn(s, device=where.device) for s in ((2, 6, 5, 7), (2, 6, 4, 9)))
    exported = torch.export.export(Head(), traced, dynamic_shapes={"src": sizes, "trg": sizes})
    other = tuple(torch.randn(s, device=where.device) for s in ((3, 6, 8, 3), (3, 6, 6, 5)))
    torch.testing.assert_close(exported.module()(*other), Head()(*other))


def test_autocast_changes_nothing(where: Place) -> None:
    inputs, function = problem(5, GRID, 6), everything(where.backend)

    def within(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(where.device.type, torch.bfloat16):
            return function(*tensors)

    # On a GPU, sums by atomic operations differ from call to call.
    tolerance = 0 if where.device.type == "cpu" else 1e-6
    assert_close(run(within, inputs, device=where.device), run(function, inputs, device=where.device), tolerance)


def test_gradcheck(device: torch.device) -> None:
    src, trg, temperature = (x.to(device).requires_grad_() for x in problem(3, (3, 4), 5, 1, torch.float64))
    for window in WINDOWS:
        options = {"window": window, "sigma": 1.5, "radius": 1}
        assert torch.autograd.gradcheck(
            lambda s, t, T, kw=options: ops.match(s, t, (3, 4), T, **kw).xy, (src, trg, temperature)
        )
    maps = trg.detach().mT.unflatten(2, (3, 4)).requires_grad_()
    centre = centres(3, (3, 4), 1).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t, c: ops.local_correlation(s, t, c, 1), (src, maps, centre))
    atomic = 1e-12 if device.type == "cuda" else 0.0  # how far sums by atomic operations may differ
    assert torch.autograd.gradcheck(lambda s, t: ops.mutual(s, t)[::2], (src, trg), nondet_tol=atomic)


def test_second_derivatives_are_an_error(where: Place) -> None:
    """There are none: a gradient without them would be wrong without a word."""
    src, trg, temperature = (x.to(where.device).requires_grad_() for x in problem(5, GRID, 6))
    xy = ops.match(src, trg, GRID, temperature, backend=where.backend).xy
    (grad,) = torch.autograd.grad(xy.sum(), src, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


def test_operators_pass_opcheck(where: Place) -> None:
    src, trg, temperature = (x.to(where.device).requires_grad_() for x in problem(5, GRID, 6))
    for window in WINDOWS:
        opcheck(strips._operator, (src, trg, temperature, None, window, *GRID, 1.0, True, where.backend, 3))
    corner = torch.tensor([-1, 2], device=where.device).expand(2, 5, 2).contiguous()
    opcheck(strips._operator, (src, trg, temperature.detach(), corner, "square", *GRID, 3.0, False, "torch", 0))
    opcheck(strips._mutual_operator, (src.detach(), trg.detach(), True))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_calls_do_no_work_on_the_host(where: Place, window: str, learned: bool) -> None:
    if where.backend == "triton" and where.device.type == "cpu":
        pytest.skip("the interpreter itself works on the host; needs a CUDA GPU, and there is none here")
    src, trg, temperature = (x.to(where.device).requires_grad_() for x in problem(5, GRID, 6))
    centre = centres(5, GRID).to(where.device).requires_grad_()
    with hostless():
        T = temperature if learned else 0.1
        xy = ops.match(src, trg, GRID, T, window, sigma=2.0, radius=1, backend=where.backend).xy
        local = ops.local_correlation(src, trg.mT.unflatten(2, GRID), centre, 1)
        found = ops.mutual(src, trg)
        leaves = (src, trg, centre, *([temperature] if learned else []))
        torch.autograd.grad(xy.sum() + local.sum() + found.row_max.sum() + found.col_max.sum(), leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cuda_graphs_capture_forward_and_backward(cuda: torch.device, backend: str) -> None:
    src, trg, temperature = (x.to(cuda).requires_grad_() for x in problem(64, (8, 8), 32, dtype=torch.bfloat16))

    def step() -> list[Tensor]:
        xy = ops.match(src, trg, (8, 8), temperature, "argmax", 2.0, backend=backend).xy
        local = ops.local_correlation(src, trg.mT.unflatten(2, (8, 8)), xy, 1)
        best = ops.mutual(src, trg).col_max
        return [xy, *torch.autograd.grad(xy.sum() + local.sum() + best.sum(), (src, trg, temperature))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        src.copy_(src.flip(1))
    graph.replay()
    assert_close(captured, step(), 1e-2)


def test_memory_is_bounded_on_a_gpu(cuda: torch.device) -> None:
    """Of a volume of 1 GB: strips of 64 MB, and half of it kept for the backward."""
    src, trg = (torch.randn(1, 128**2, 64, device=cuda, dtype=torch.bfloat16).requires_grad_() for _ in range(2))

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        xy = ops.match(src, trg, (128, 128), 0.1, "argmax", 7.0, backend="triton").xy
        if xy.requires_grad:
            torch.autograd.grad(xy.sum(), (src, trg))
        return torch.cuda.max_memory_allocated() - before

    with torch.no_grad():
        peak()  # the first product of a process takes memory for all of its products
        assert peak() < 80 * 2**20
    assert peak() < 680 * 2**20


def test_auto_chooses_triton_on_a_gpu(cuda: torch.device) -> None:
    assert ops.resolve_backend("auto", torch.zeros(1, device=cuda)) == "triton"
    assert ops.resolve_backend("auto", torch.zeros(1, device=cuda, dtype=torch.float64)) == "torch"


@pytest.fixture(params=[(2**21, 512), (800, 1), (2400, 1)], ids=["one strip", "rows", "items"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("CPU_STRIP", "ROWS"), request.param, strict=True):
        monkeypatch.setattr(strips, name, value)
    monkeypatch.setattr(strips, "WHOLE", 0)
    monkeypatch.setattr(strips, "STRIP", request.param[0])


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("normalize", [True, False])
def test_mutual_and_local_correlation_equal_the_reference(device: torch.device, normalize: bool) -> None:
    src, trg, _ = problem(7, GRID, 6, dtype=torch.float64)
    mine = run(lambda s, t: ops.mutual(s, t, normalize), (src, trg), device=device)
    assert_close(mine, run(lambda s, t: reference.mutual(s, t, normalize), (src, trg)), 1e-12)
    inputs = (src, trg.mT.unflatten(2, GRID), centres(7, GRID))
    for radius in (0, 2):
        mine = run(lambda s, t, c, r=radius: ops.local_correlation(s, t, c, r, normalize), inputs, device=device)
        exact = run(lambda s, t, c, r=radius: reference.local_correlation(s, t, c, r, normalize), inputs)
        assert_close(mine, exact, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mutual_and_local_correlation_of_half_precision(device: torch.device, dtype: torch.dtype) -> None:
    src, trg, _ = problem(40, (9, 15), 40, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    mine = run(ops.mutual, (src, trg), device=device)
    assert_close(mine, run(reference.mutual, (src, trg), torch.float64), tolerance)
    inputs = (src, trg.mT.unflatten(2, (9, 15)), centres(40, (9, 15)).float())
    mine = run(lambda s, t, c: ops.local_correlation(s, t, c, 4), inputs, device=device)
    exact = run(lambda s, t, c: reference.local_correlation(s, t, c, 4), inputs, torch.float64)
    assert mine[0].dtype == torch.float32
    assert_close(mine, exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_local_scores_that_a_gpu_rounds(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "resolve_backend", lambda *_: "triton")
    src, trg, _ = problem(40, (9, 15), 40, dtype=dtype)
    inputs = (src, trg.mT.unflatten(2, (9, 15)), centres(40, (9, 15)).float())
    mine = run(lambda s, t, c: ops.local_correlation(s, t, c, 4), inputs, device=device)
    exact = run(lambda s, t, c: reference.local_correlation(s, t, c, 4), inputs, torch.float64)
    assert_close(mine[:1], exact[:1], 1e-5)
    assert_close(mine[1:], exact[1:], 8e-3)


@pytest.mark.usefixtures("room")
def test_mutual_ties_and_nan(device: torch.device) -> None:
    src, trg, _ = (x.to(device) for x in integers(9, GRID, 6))
    out, plain = ops.mutual(src, trg, normalize=False), reference.mutual(src.cpu(), trg.cpu(), normalize=False)
    assert torch.equal(out.row_argmax.cpu(), plain.row_argmax) and torch.equal(out.col_argmax.cpu(), plain.col_argmax)
    src[0, 2, 3] = torch.nan
    out, plain = ops.mutual(src, trg), reference.mutual(src.cpu(), trg.cpu())
    torch.testing.assert_close([x.cpu() for x in out], list(plain), equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src": torch.zeros(2, 3)}, r"expected src of shape \(B, points, C\)"),
        ({"src": torch.zeros(2, 0, 6)}, "nothing empty"),
        ({"src": torch.zeros(0, 3, 6), "trg": torch.zeros(0, 20, 6)}, "nothing empty"),
        ({"src": torch.zeros(2, 3, 5)}, "must agree in the batch and in C"),
        ({"src": torch.zeros(2, 3, 6, dtype=torch.float64)}, "must agree"),
        ({"src": torch.zeros(2, 3, 6, dtype=torch.int64)}, "floating"),
        ({"trg_grid": (3, 5)}, "as many cells as the target: 20"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.ones(2)}, "0-d tensor"),
        ({"window": "agmax"}, "did you mean 'argmax'"),
        ({"window": "argmax"}, "needs sigma above 1e-6, got None"),
        ({"window": "argmax", "sigma": 1e-30}, "needs sigma above 1e-6, got 1e-30"),
        ({"window": "argmax", "sigma": -1.0}, "needs sigma above 1e-6, got -1.0"),
        ({"window": "crop"}, "radius must be a whole number of cells, 0 or more, got None"),
        ({"window": "crop", "radius": 1.5}, "radius must be a whole number"),
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
    """No triton before it runs, and none of the zoo's other dependencies."""
    others = ("triton", "lightning", "timm", "einops", "torchmetrics", "scipy", "PIL", "jsonargparse")
    code = (
        "import torch, sys; before = set(sys.modules); import corrzoo.ops;"
        f"print([m for m in set(sys.modules) - before if m.split('.')[0] in {others}])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
