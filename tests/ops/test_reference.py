"""The reference against plain loops in float64."""

import math

import pytest
import torch

from corrzoo.ops import reference
from corrzoo.types import ZooError

H, W, T = 3, 5, 0.2


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("window", ["none", "argmax", "crop"])
def test_readout_is_the_mean_over_weighted_cells(window: str) -> None:
    scores = features(0, 2, 4, H * W)
    out = reference.readout(scores, (H, W), T, window, 1.3, 1)
    for b in range(2):
        for n in range(4):
            row = scores[b, n].tolist()
            best = max(range(H * W), key=lambda j: (row[j], -j))
            cx, cy = best % W + 0.5, best // W + 0.5
            logits, cells = [], []
            for j, s in enumerate(row):
                x, y = j % W + 0.5, j // W + 0.5
                if window == "crop" and max(abs(x - cx), abs(y - cy)) > 1:
                    continue
                g = math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 1.3**2)) if window == "argmax" else 1
                logits.append(g * s / T)
                cells.append((x, y))
            mass = sum(map(math.exp, logits))
            p = [math.exp(z) / mass for z in logits]
            assert out.xy[b, n, 0].item() == pytest.approx(sum(a * x for a, (x, _) in zip(p, cells, strict=True)))
            assert out.xy[b, n, 1].item() == pytest.approx(sum(a * y for a, (_, y) in zip(p, cells, strict=True)))
            assert out.argmax[b, n].item() == best


def test_local_correlation_reads_bilinearly_and_zero_outside() -> None:
    src, trg = features(0, 1, 3, 4), features(1, 1, 4, H, W)
    centre = torch.tensor([[[2.5, 1.5], [0.2, 2.9], [4.1, -0.3]]], dtype=torch.float64)
    out = reference.local_correlation(src, trg, centre, 1, normalize=False)

    def read(c: int, x: float, y: float) -> float:
        value, x, y = 0.0, x - 0.5, y - 0.5
        for j in (math.floor(x), math.floor(x) + 1):
            for i in (math.floor(y), math.floor(y) + 1):
                if 0 <= j < W and 0 <= i < H:
                    value += (1 - abs(x - j)) * (1 - abs(y - i)) * trg[0, c, i, j].item()
        return value

    for n, (x, y) in enumerate(centre[0].tolist()):
        offsets = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        expected = [sum(src[0, n, c].item() * read(c, x + dx, y + dy) for c in range(4)) for dx, dy in offsets]
        assert out[0, n].tolist() == pytest.approx(expected)


def test_cosines_of_zero_features_are_zero_and_have_no_gradient() -> None:
    src = torch.zeros(1, 2, 4, requires_grad=True)
    scores = reference.correlation(src, torch.randn(1, 3, 4))
    scores.sum().backward()
    assert scores.abs().max() == 0 and src.grad.abs().max() == 0


@pytest.mark.parametrize("grid", [(-3, -5), (5, 5)])
def test_a_grid_of_another_size_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(ZooError, match="as many cells as the target: 15"):
        reference.readout(torch.zeros(1, 2, 15), grid, T)


@pytest.mark.parametrize("shape", [(4, 15), (2, 0, 15)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ZooError, match=r"expected scores of shape \(B, N, M\) with nothing empty"):
        reference.readout(torch.zeros(shape), (3, 5), T)
