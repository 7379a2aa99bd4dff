"""The Triton kernels against the float64 reference: on a GPU where there is one, else in the interpreter."""

import pytest
import torch
from problems import WINDOWS, assert_close, integers, naive, problem, run
from torch import Tensor

from corrzoo import ops
from corrzoo.ops import reference

pytest.importorskip("triton", reason="needs triton, whose kernels these are")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and there is none here")


def on(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.to(device) for x in tensors]


def check(
    device: torch.device, inputs: tuple, grid: tuple[int, int], tolerances: tuple[float, float], **options
) -> None:
    """Outputs and gradients of `match` within tolerances of the float64 reference on the same inputs."""
    mine = run(lambda s, t, T, c: ops.match(s, t, grid, T, centre=c, backend="triton", **options), on(device, *inputs))
    exact = run(lambda s, t, T, c: naive(s, t, grid, T, c, **options), inputs, torch.float64)
    assert torch.equal(mine[2].cpu(), exact[2])
    assert_close(mine[:5], exact[:5], tolerances[0], floor=1.0)
    assert_close(mine[5:], exact[5:], tolerances[1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_match_equals_the_reference(device: torch.device, window: str, normalize: bool) -> None:
    """37 points and 9 x 15 cells: no size is a multiple of a tile, and the columns are split."""
    options = {"window": window, "sigma": 2.3, "radius": 2, "normalize": normalize}
    src, trg, temperature, centre = problem(37, (9, 15), 40, window=window)
    temperature = temperature if normalize else temperature * 30
    check(device, (src, trg, temperature, centre), (9, 15), (5e-6, 2e-5), **options)


@pytest.mark.parametrize(("C", "window"), [(96, "argmax"), (384, "none"), (768, "given")])
def test_match_at_the_backbones_widths(device: torch.device, C: int, window: str) -> None:
    check(device, problem(70, (16, 20), C, B=1, window=window), (16, 20), (5e-6, 2e-5), window=window, sigma=5.0)


@pytest.mark.parametrize("temperature", [0.005, 1.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_match_at_extreme_temperatures(device: torch.device, window: str, temperature: float) -> None:
    src, trg, _, centre = problem(20, (9, 15), 40, window=window)
    inputs = (src, trg, torch.tensor(temperature), centre)
    # At 0.005 a score's last bit, 6e-8, is 1.2e-5 of a logit.
    check(device, inputs, (9, 15), (5e-5, 5e-4), window=window, sigma=2.0, radius=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_lose_nothing_before_the_sum(device: torch.device, dtype: torch.dtype) -> None:
    inputs = problem(37, (9, 15), 96, dtype=dtype, window="argmax")
    check(device, inputs, (9, 15), (5e-6, 8e-3), window="argmax", sigma=2.0)


@pytest.mark.parametrize("window", WINDOWS)
def test_ties_go_to_the_lowest_index(device: torch.device, window: str) -> None:
    inputs = integers(20, (9, 15), 40, window=window)
    inputs[1][:, 68:] = inputs[1][:, :67]  # cells of the first tile again in the second
    check(device, inputs, (9, 15), (5e-6, 3e-5), window=window, sigma=2.0, radius=1, normalize=False)


def test_zero_features_are_flat_and_have_no_gradient(device: torch.device) -> None:
    src, trg, temperature, _ = problem(20, (9, 15), 40)
    src[:, 3], trg[:, 5] = 0, 0
    for window in ("none", "argmax", "crop"):
        inputs = (src, trg, temperature, None)
        check(device, inputs, (9, 15), (5e-6, 3e-5), window=window, sigma=2.0, radius=1)


def test_transposed_maps_and_few_queries(device: torch.device) -> None:
    """Features as a backbone's map gives them, (B, C, h, w) seen as (B, h*w, C)."""
    src, trg, temperature, _ = problem(3, (9, 15), 40)
    trg = trg.mT.contiguous().mT
    check(device, (src, trg, temperature, None), (9, 15), (5e-6, 2e-5))


@pytest.mark.parametrize("normalize", [True, False])
def test_mutual_equals_the_reference(device: torch.device, normalize: bool) -> None:
    src, trg, *_ = problem(140, (9, 15), 40) if normalize else integers(140, (9, 15), 40)
    mine = run(lambda s, t: ops.mutual(s, t, normalize, backend="triton"), on(device, src, trg))
    exact = run(lambda s, t: reference.mutual(s, t, normalize), (src, trg), torch.float64)
    assert_close(mine, exact, 1e-5)
    assert torch.equal(mine[1].cpu(), exact[1]) and torch.equal(mine[3].cpu(), exact[3])


@pytest.mark.parametrize("radius", [0, 2, 4])
def test_local_correlation_equals_the_reference(device: torch.device, radius: int) -> None:
    src, trg, _, centre = problem(17, (9, 15), 40)
    inputs = (src, trg.mT.unflatten(2, (9, 15)), centre * 1.5 - 2)
    mine = run(lambda s, t, c: ops.local_correlation(s, t, c, radius, backend="triton"), on(device, *inputs))
    exact = run(lambda s, t, c: reference.local_correlation(s, t, c, radius), inputs, torch.float64)
    assert_close(mine, exact, 3e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_propagates(device: torch.device) -> None:
    src, trg, temperature, _ = problem(5, (9, 15), 40)
    src[0, 2, 3] = torch.nan
    src, trg, temperature = on(device, src, trg, temperature)
    for window in ("none", "argmax"):
        mine = ops.match(src, trg, (9, 15), temperature, window=window, sigma=2.0, backend="triton")
        plain = naive(src, trg, (9, 15), temperature, None, window=window, sigma=2.0)
        torch.testing.assert_close(mine, plain, equal_nan=True, rtol=1e-4, atol=1e-5)
    mine, plain = ops.mutual(src, trg, backend="triton"), reference.mutual(src, trg)
    torch.testing.assert_close(mine, plain, equal_nan=True, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
def test_match_at_full_size_on_the_device(device: torch.device, window: str, dtype: torch.dtype) -> None:
    inputs = problem(4096, (64, 64), 768, dtype=dtype, window=window)
    tolerances = (1e-5, 2e-5 if dtype == torch.float32 else 8e-3)
    check(device, inputs, (64, 64), tolerances, window=window, sigma=7.0, radius=3)


@needs_gpu
def test_match_holds_no_volume_on_the_device(device: torch.device) -> None:
    src, trg, temperature, _ = on(device, *problem(128**2, (128, 128), 768, B=1, dtype=torch.bfloat16, window="none"))
    ops.match(src, trg, (128, 128), temperature)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.match(src, trg, (128, 128), temperature)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@needs_gpu
def test_auto_chooses_triton_on_the_device(device: torch.device) -> None:
    assert ops.functional.resolve_backend("auto", torch.zeros(1, device=device)) == "triton"
