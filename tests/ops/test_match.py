"""`match` against the float64 reference: every implementation, on every device that is here."""

import itertools

import pytest
import torch
from problems import WINDOWS, Grid, Problem, assert_close, integers, naive, problem, run

from conftest import Place
from corrzoo import ops
from corrzoo.ops import epilogue, strips

GRID = (9, 15)


def check(
    where: Place, inputs: Problem, tolerances: tuple[float, float], grid: Grid = GRID,
    floors: tuple[float, float] = (1e-3, 1e-3), **options,
) -> None:  # fmt: skip
    """Positions and gradients within tolerances of the float64 reference of the same inputs.

    Errors are relative to the largest value, but at least to 1 cell, and to `floors` for gradients of features and of
    the temperature.
    """
    mine = run(lambda s, t, T: ops.match(s, t, grid, T, backend=where.backend, **options), inputs, device=where.device)
    exact = run(lambda s, t, T: naive(s, t, grid, T, **options), inputs, torch.float64, where.device)
    assert torch.equal(mine[1], exact[1])
    assert mine[0].dtype == torch.promote_types(inputs[0].dtype, torch.float32)
    assert_close(mine[:1], exact[:1], tolerances[0], floor=1.0)
    assert_close(mine[2:4], exact[2:4], tolerances[1], floor=floors[0])
    assert_close(mine[4:], exact[4:], tolerances[1], floor=floors[1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_match_equals_the_reference(where: Place, window: str, normalize: bool) -> None:
    """37 points and 9 x 15 cells: no size is a multiple of a tile."""
    options = {"window": window, "sigma": 2.3, "radius": 2, "normalize": normalize}
    src, trg, temperature = problem(37, GRID, 40)
    check(where, (src, trg, temperature if normalize else temperature * 30), (5e-6, 2e-5), **options)


@pytest.mark.parametrize("grid", [(16, 16), (1, 40), (40, 1), (8, 64)])
@pytest.mark.parametrize("window", WINDOWS)
def test_grids_of_any_shape(where: Place, window: str, grid: Grid) -> None:
    # dT sums terms of either sign over the cells and points: 10 is 1 cell of log T, of 40 cells, at T = 0.1.
    check(where, problem(5, grid, 24), (5e-6, 2e-5), grid, (1e-3, 10), window=window, sigma=2.0, radius=3)


@pytest.mark.parametrize("window", WINDOWS)
def test_more_cells_than_a_program_holds(where: Place, window: str) -> None:
    """Above 16,384 cells a kernel reads a row in several tiles."""
    grid = (130, 129)
    # As above: terms of dT are up to 65 cells * 20 log2(p) / T.
    check(where, problem(3, grid, 8, B=1), (2e-5, 1e-4), grid, (1e-3, 10), window=window, sigma=20.0, radius=4)


@pytest.mark.parametrize(("C", "window"), [(96, "argmax"), (384, "none"), (768, "crop")])
def test_widths_of_backbones(where: Place, C: int, window: str) -> None:
    check(where, problem(70, (16, 20), C, B=1), (5e-6, 2e-5), (16, 20), window=window, sigma=5.0, radius=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
def test_full_size_on_a_gpu(cuda: torch.device, window: str, dtype: torch.dtype) -> None:
    tolerances = (1e-5, 2e-5 if dtype == torch.float32 else 8e-3)
    options = {"window": window, "sigma": 7.0, "radius": 3}
    floors = (1e-3, 1e3)  # dT sums 8,180 points' terms of either sign
    # Of these points, no two best cosines are closer than 5e-7: of 4,096 they would be, and rounding would decide.
    check(Place("triton", cuda), problem(4090, (64, 64), 768, dtype=dtype), tolerances, (64, 64), floors, **options)


def test_a_batch_larger_than_a_launch_axis_on_a_gpu(cuda: torch.device) -> None:
    check(Place("triton", cuda), problem(2, (1, 2), 3, B=70_000), (5e-6, 2e-5), (1, 2), window="argmax", sigma=1.0)


@pytest.mark.parametrize("temperature", [0.005, 1.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_extreme_temperatures(where: Place, window: str, temperature: float) -> None:
    src, trg, _ = problem(20, GRID, 40)
    # At 0.005 a score's last bit, 6e-8, is 1.2e-5 of a logit. The crop's softmax has one cell then, v = xy but for xy's
    # last bit, 1e-6 of 15: gradients are below 2e-3, and that bit alone is 1e-6 / (T |f|) = 3e-5 of them.
    floors = (0.1, 1e-3) if window == "crop" and temperature == 0.005 else (1e-3, 1e-3)
    options = {"window": window, "sigma": 2.0, "radius": 1}
    check(where, (src, trg, torch.tensor(temperature)), (5e-5, 5e-4), floors=floors, **options)


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_whose_scores_are_all_negative(where: Place, window: str) -> None:
    """The Gaussian then raises far cells above the argmax."""
    src, trg, temperature = problem(10, GRID, 6)
    src, trg = src.abs(), -trg.abs()
    check(where, (src, trg, temperature / 20), (5e-5, 5e-4), window=window, sigma=50.0, radius=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", WINDOWS)
def test_half_precision_loses_nothing_before_the_sum(where: Place, window: str, dtype: torch.dtype) -> None:
    """Kernels round the scores' gradients to bfloat16, for the sake of the GEMMs that follow."""
    tolerance = 8e-3 if where.backend == "triton" else {torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    check(where, problem(37, GRID, 96, dtype=dtype), (5e-6, tolerance), window=window, sigma=2.0, radius=2)


def test_small_gradients_survive_float16_features(where: Place) -> None:
    """A loss that is a mean over many points has gradients of scores below float16's smallest number."""
    src, trg, _ = problem(37, GRID, 96, dtype=torch.float16)
    src = src.to(where.device).requires_grad_()
    xy = ops.match(src, trg.to(where.device), GRID, 0.1, backend=where.backend).xy
    (small,) = torch.autograd.grad((xy * 1e-4).sum(), src, retain_graph=True)
    (large,) = torch.autograd.grad(xy.sum(), src)
    assert (small.float() * 1e4 - large.float()).abs().max() < 0.02 * large.float().abs().max()


@pytest.mark.parametrize("window", WINDOWS)
def test_ties_go_to_the_lowest_index(where: Place, window: str) -> None:
    src, trg, temperature = integers(20, GRID, 40)
    trg[:, 68:] = trg[:, :67]
    options = {"window": window, "sigma": 2.0, "radius": 1, "normalize": False}
    check(where, (src, trg, temperature), (5e-6, 3e-5), **options)


@pytest.mark.parametrize("window", WINDOWS)
def test_zero_features_score_zero_and_have_no_gradient(where: Place, window: str) -> None:
    src, trg, temperature = problem(20, GRID, 40)
    src[:, 3], trg[:, 5] = 0, 0
    check(where, (src, trg, temperature), (5e-6, 3e-5), window=window, sigma=2.0, radius=1)


def test_maps_in_any_memory_format_and_few_points(where: Place) -> None:
    """Features (B, h * w, C) that are views of maps (B, C, h, w), contiguous or channels_last."""
    src, trg, temperature = problem(3, GRID, 40)
    maps = trg.mT.unflatten(2, GRID)
    for layout in (torch.contiguous_format, torch.channels_last):
        check(where, (src, maps.contiguous(memory_format=layout).flatten(2).mT, temperature), (5e-6, 2e-5))
    check(where, (src[:, :, ::2], trg[:, :, ::2], temperature), (5e-6, 2e-5))


def test_nan_propagates_as_in_the_reference(where: Place) -> None:
    src, trg, temperature = problem(5, GRID, 40)
    src[0, 2, 3], trg[1, 70, 0] = torch.nan, torch.nan
    for window in WINDOWS:
        options = {"window": window, "sigma": 2.0, "radius": 1}
        features = (src.to(where.device), trg.to(where.device), GRID)
        mine = ops.match(*features, temperature.to(where.device), backend=where.backend, **options)
        plain = naive(src, trg, GRID, temperature, **options)
        torch.testing.assert_close([x.cpu() for x in mine], list(plain), equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_overflows_gives_nan_and_no_match(where: Place, dtype: torch.dtype) -> None:
    """Otherwise all scores of such a point would be 0, and its match the middle of the target."""
    src, trg, temperature = (x.to(where.device) for x in problem(5, GRID, 40, dtype=dtype))
    src[0, 2] = 1e25
    xy = ops.match(src, trg, GRID, temperature.float(), backend=where.backend).xy
    assert xy[0, 2].isnan().all() and xy.isnan().sum() == 2


def test_the_temperature_may_be_a_number(where: Place) -> None:
    src, trg, _ = (x.to(where.device) for x in problem(9, GRID, 40))
    one = run(lambda s, t: ops.match(s, t, GRID, 0.25, "argmax", 2.0, backend=where.backend), (src, trg))
    T = torch.tensor(0.25, device=where.device)
    other = run(lambda s, t: ops.match(s, t, GRID, T, "argmax", 2.0, backend=where.backend), (src, trg))
    assert_close(one, other, 1e-6)


@pytest.mark.parametrize("strip", [1, 9 * 15 * 4 * 2, 9 * 15 * 4 * 20])
def test_strips_of_a_row_of_two_and_of_two_items(where: Place, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WHOLE", 0), ("STRIP", strip), ("CPU_STRIP", strip), ("ROWS", 1)):
        monkeypatch.setattr(strips, name, value)
    for keep in (0, 3):
        monkeypatch.setattr(strips, "points_to_keep", lambda *_, keep=keep: keep)
        check(where, problem(7, GRID, 40), (5e-6, 2e-5))


@pytest.mark.parametrize("needed", ["src", "trg", "temperature"])
def test_a_single_gradient(where: Place, needed: str) -> None:
    inputs = dict(zip(("src", "trg", "temperature"), (x.to(where.device) for x in problem(9, GRID, 40)), strict=True))
    rest = {name: x for name, x in inputs.items() if name != needed}
    mine = run(lambda x: ops.match(**rest, **{needed: x}, trg_grid=GRID, backend=where.backend), [inputs[needed]])
    double = {name: x.double() for name, x in rest.items()}
    exact = run(lambda x: naive(**double, **{needed: x}, grid=GRID), [inputs[needed]], torch.float64)
    assert_close(mine, exact, 2e-5)


def test_a_graph_may_be_used_twice(where: Place) -> None:
    src, trg, temperature = (x.to(where.device).requires_grad_() for x in problem(9, GRID, 40))
    xy = ops.match(src, trg, GRID, temperature, "argmax", 2.0, backend=where.backend).xy
    first, second = (torch.autograd.grad(xy.sum(), (src, trg, temperature), retain_graph=True) for _ in range(2))
    assert_close(first, second, 0)


@pytest.mark.parametrize(("strip", "rows", "chunk"), [(800, 1, 47), (2400, 1, 150), (2**21, 512, 2**18)])
@pytest.mark.parametrize("keep", [0, 3, 7])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_strips_and_chunks_in_float64(
    device: torch.device, window: str, normalize: bool, keep: int, strip: int, rows: int, chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Strips of some rows and of several items; none, some or all of the logits kept for the backward."""
    monkeypatch.setattr(strips, "points_to_keep", lambda *_: keep)
    for name, value in (("WHOLE", 0), ("STRIP", strip), ("CPU_STRIP", strip), ("ROWS", rows)):
        monkeypatch.setattr(strips, name, value)
    monkeypatch.setitem(epilogue.CHUNK, device.type, chunk)
    inputs = problem(7, (4, 5), 6, B=3, dtype=torch.float64)
    options = {"window": window, "sigma": 1.3, "radius": 1, "normalize": normalize}
    # Without norms logits reach 100, so that exp2 rounds to 1e-14 of terms up to 10 / T of gradients.
    floors, tolerance = ((1e-3, 1e-3), 1e-12) if normalize else ((0.1, 1.0), 1e-11)
    check(Place("torch", device), inputs, (tolerance, tolerance), (4, 5), floors, **options)


def test_what_is_kept_for_the_backward() -> None:
    def kept(side: int, batch: int) -> int:
        x = torch.empty(batch, side**2, 1, device="meta")
        return strips.points_to_keep(x, x)

    assert kept(16, 16) == 256 and kept(32, 8) == 1024  # up to 32 MB: all
    assert kept(64, 1) == 2048  # half of 64 MB
    assert kept(128, 4) * 4 * 128**2 * 4 == 512 * 2**20  # and 512 MB of 4 GB


def test_memory_on_a_cpu() -> None:
    """Beyond a volume of 16 MB that is kept, a backward holds a strip of 4 MB and a few chunks of 1 MB."""
    src, trg = (torch.randn(1, 2048, 4, requires_grad=True) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(ops.match(src, trg, (32, 64), 0.1, "argmax", 7.0).xy.sum(), (src, trg))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    assert 16 * 2**20 < max(held) < 26 * 2**20


@pytest.mark.parametrize("cells", [20, 128])
def test_row_maxima_are_the_first(cells: int) -> None:
    x = torch.randint(0, 9, (2, 50, cells), generator=torch.Generator().manual_seed(0)).float()
    x[0, 3, 100 % cells] = x[0, 3, 7] = torch.nan
    for mine, plain in zip(epilogue.row_maxima(x), x.max(-1), strict=True):
        torch.testing.assert_close(mine, plain, equal_nan=True)
