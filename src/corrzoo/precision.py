"""Full precision inside mixed precision: float32 computation within an autocast region."""

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """Convert x to float32; keep float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def full_precision(x: Tensor) -> torch.autocast:
    """Disable autocast on the device of x: at a temperature of 0.02, rounding cosines to bfloat16 moves the argmax."""
    return torch.autocast(x.device.type, enabled=False)
