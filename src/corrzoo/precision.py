"""Islands of full precision inside autocast: float32, or float64 where the input has it."""

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> torch.autocast:
    """Context without autocast on the device of `x`: at a temperature of 0.02, bfloat16 rounding moves the argmax."""
    return torch.autocast(x.device.type, enabled=False)
