"""Losses that more than one head trains with."""

import torch
from torch import Tensor


def endpoint_error(flow: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """EPE: mean Euclidean distance between two flows over the supervised cells of the whole batch (ViTSC eq. 6).

    Args:
        flow: (B, 2, h, w) prediction.
        target: (B, 2, h, w) ground truth in the same unit.
        mask: (B, h, w) bool, the supervised cells.

    Returns:
        Scalar; zero, with a gradient of zero, when no cell is supervised.
    """
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))  # float64 stays what it is
    error = flow - target.to(flow.dtype)
    # The root's gradient is infinite at zero error, and NaN times a zero mask is NaN: mask before the norm.
    error = torch.where(mask.unsqueeze(1), error, torch.ones_like(error))
    distance = torch.linalg.vector_norm(error, dim=1)
    return (distance * mask).sum() / mask.sum().clamp(min=1)
