"""Problems for the op's tests, and outputs with gradients of one function to compare with another's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from corrzoo.ops import Readout, reference

WINDOWS = ("none", "argmax", "crop")
Grid = tuple[int, int]
Problem = tuple[Tensor, Tensor, Tensor]


def problem(N: int, grid: Grid, C: int, B: int = 2, dtype: torch.dtype = torch.float32) -> Problem:
    """Source features (B, N, C), target features (B, h * w, C) and a temperature."""
    g = torch.Generator().manual_seed(N * 1000 + C)
    src, trg = (torch.randn(B, n, C, generator=g, dtype=torch.float64).to(dtype) for n in (N, grid[0] * grid[1]))
    return src, trg, torch.tensor(0.1, dtype=torch.promote_types(dtype, torch.float32))


def centres(N: int, grid: Grid, B: int = 2) -> Tensor:
    """Points (B, N, 2) float64 in and around the grid, in cells."""
    g = torch.Generator().manual_seed(N)
    return torch.rand(B, N, 2, generator=g, dtype=torch.float64) * 1.5 * torch.tensor(grid[::-1]) - 2


def integers(N: int, grid: Grid, C: int) -> Problem:
    """`problem` with features in {-1, 0, 1}: their products are exact in any order, and have many ties."""
    src, trg, temperature = problem(N, grid, C)
    return src.round().clamp(-1, 1), trg.round().clamp(-1, 1), temperature * 50


def naive(src: Tensor, trg: Tensor, grid: Grid, temperature: Tensor | float, **options) -> Readout:
    normalize = options.pop("normalize", True)
    return reference.readout(reference.correlation(src, trg, normalize), grid, temperature, **options)


def run(
    function: Callable, inputs: Sequence[Tensor], dtype: torch.dtype | None = None, device: torch.device | None = None
) -> list[Tensor]:
    """Outputs of `function(*inputs)` and the gradients of a fixed random projection of them to every input."""
    leaves = [x.detach().to(device).clone().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    g = torch.Generator().manual_seed(0)
    loss = sum(
        (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)).sum() for x in out if x.is_floating_point()
    )
    loss.backward()
    return [x.detach() for x in out] + [x.grad for x in leaves]


def assert_close(mine: Sequence[Tensor], reference: Sequence[Tensor], tolerance: float, floor: float = 1e-3) -> None:
    """Every tensor within `tolerance` of the largest value of its reference (or of `floor`, if that is larger)."""
    assert len(mine) == len(reference)
    for i, (a, b) in enumerate(zip(mine, reference, strict=True)):
        scale = max(b.abs().max().item(), floor)
        error = (a.double().cpu() - b.double().cpu()).abs().max().item() / scale
        assert error <= tolerance, f"tensor {i}: {error:.2e} of {scale:.2e}"
