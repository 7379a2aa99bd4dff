"""4-D convolution of correlation volumes, which torch does not have (NCNet's neighbourhood consensus)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from corrzoo.types import ZooError


def conv4d(volume: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve volumes over all four axes, with stride 1 and zeros around them; in torch's sense, without a flip.

    One 3-D convolution does all of the arithmetic. The kernel's k offsets along the first axis become channels: of its
    input or, if there are fewer of them, of its output, which is then shifted and added. See benchmarks/conv4d.py.

    Args:
        volume: (B, C, h, w, H, W).
        weight: (D, C, k, k, k, k), with an odd k.
        bias: (D,).

    Returns:
        (B, D, h, w, H, W).

    Raises:
        ZooError: if shapes do not fit, or the kernel's side is even.
    """
    _check(volume, weight)
    kernel, (batch, _, h, *_) = weight.shape[2], volume.shape
    radius, rows = kernel // 2, volume.movedim(2, 1)  # (B, h, C, w, H, W)
    if weight.shape[1] <= weight.shape[0]:
        rows = F.pad(rows, (0, 0) * 4 + (radius, radius))  # (B, h + 2r, C, w, H, W)
        near = torch.stack([rows[:, i : i + h] for i in range(kernel)], dim=2)  # (B, h, k, C, w, H, W)
        filters = weight.movedim(2, 1).flatten(1, 2)  # (D, k * C, k, k, k)
        out = F.conv3d(near.flatten(2, 3).flatten(0, 1), filters, bias, padding=radius)  # (B * h, D, w, H, W)
        return out.unflatten(0, (batch, h)).movedim(1, 2)
    filters = weight.movedim(2, 0).flatten(0, 1)  # (k * D, C, k, k, k)
    out = F.conv3d(rows.flatten(0, 1), filters, padding=radius)  # (B * h, k * D, w, H, W)
    out = out.unflatten(0, (batch, h)).unflatten(2, (kernel, -1))  # (B, h, k, D, w, H, W)
    out = F.pad(out, (0, 0) * 5 + (radius, radius))  # (B, h + 2r, k, D, w, H, W)
    total = out[:, :h, 0]  # (B, h, D, w, H, W)
    for i in range(1, kernel):
        total = total + out[:, i : i + h, i]
    total = total.movedim(1, 2)
    return total if bias is None else total + bias.view(-1, 1, 1, 1, 1)


def conv4d_reference(volume: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `conv4d` equals: the sum over the kernel's first axis of 3-D convolutions of the shifted rows."""
    _check(volume, weight)
    kernel, (batch, _, h, *_) = weight.shape[2], volume.shape
    radius = kernel // 2
    rows = F.pad(volume.movedim(2, 1), (0, 0) * 4 + (radius, radius))  # (B, h + 2r, C, w, H, W)
    total = volume.new_zeros(())
    for i in range(kernel):
        shifted = rows[:, i : i + h].flatten(0, 1)  # (B * h, C, w, H, W)
        total = total + F.conv3d(shifted, weight[:, :, i], bias if i == 0 else None, padding=radius)
    return total.unflatten(0, (batch, h)).movedim(1, 2)


def _check(volume: Tensor, weight: Tensor) -> None:
    if volume.ndim != 6 or weight.ndim != 6 or volume.shape[1] != weight.shape[1]:
        shapes = f"{tuple(volume.shape)} and {tuple(weight.shape)}"
        raise ZooError(f"expected a volume (B, C, h, w, H, W) and a weight (D, C, k, k, k, k), got {shapes}")
    if len(set(weight.shape[2:])) > 1 or weight.shape[2] % 2 == 0:
        raise ZooError(f"expected a kernel of one odd side, got {tuple(weight.shape[2:])}")
