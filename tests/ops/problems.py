"""What the op's tests share: problems, and outputs with gradients of one function to compare with another's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from corrzoo.ops import Matches, reference

WINDOWS = ("none", "argmax", "given", "crop")


def problem(
    N: int, grid: tuple[int, int], C: int, B: int = 2, dtype: torch.dtype = torch.float32, window: str = "given"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(src, trg, temperature, centre): the centre only for the window that takes one."""
    g = torch.Generator().manual_seed(N * 1000 + C)
    src, trg = (torch.randn(B, n, C, generator=g, dtype=torch.float64).to(dtype) for n in (N, grid[0] * grid[1]))
    centre = torch.rand(B, N, 2, generator=g, dtype=torch.float64) * torch.tensor(grid[::-1])
    wide = dtype if dtype == torch.float64 else torch.float32
    return src, trg, torch.tensor(0.1, dtype=wide), centre.to(wide) if window == "given" else None


def integers(N: int, grid: tuple[int, int], C: int, **kw) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`problem` with features in {-1, 0, 1}: their products are exact in any order, and full of ties."""
    src, trg, temperature, centre = problem(N, grid, C, **kw)
    return src.round().clamp(-1, 1), trg.round().clamp(-1, 1), temperature * 50, centre


def naive(src: Tensor, trg: Tensor, grid: tuple[int, int], temperature: Tensor, centre: Tensor | None, **kw) -> Matches:
    normalize = kw.pop("normalize", True)
    return reference.readout(reference.correlation(src, trg, normalize), grid, temperature, centre=centre, **kw)


def run(function: Callable, inputs: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs of `function(*inputs)` and the gradients of a fixed random projection of them to every input."""
    leaves = [x if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    g = torch.Generator().manual_seed(0)
    loss = sum(
        (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)).sum() for x in out if x.is_floating_point()
    )
    loss.backward()
    return [x.detach() for x in out] + [x.grad for x in leaves if x is not None]


def assert_close(mine: Sequence[Tensor], reference: Sequence[Tensor], tolerance: float, floor: float = 1e-3) -> None:
    """Every tensor within `tolerance` of the largest value of its reference (or of `floor`, if that is larger)."""
    assert len(mine) == len(reference)
    for i, (a, b) in enumerate(zip(mine, reference, strict=True)):
        scale = max(b.abs().max().item(), floor)
        error = (a.double().cpu() - b.double().cpu()).abs().max().item() / scale
        assert error <= tolerance, f"tensor {i}: {error:.2e} of {scale:.2e}"
