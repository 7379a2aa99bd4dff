"""Losses that more than one head trains with, and means over what several processes have of a batch."""

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor

Term = tuple[Tensor, Tensor]
"""Values of a loss, and a bool of the same shape: where they count."""


def endpoint_errors(flow: Tensor, target: Tensor, mask: Tensor) -> Term:
    """Euclidean distance between two flows at each cell, whose mean is the EPE (ViTSC eq. 6).

    Args:
        flow: (B, 2, h, w) prediction.
        target: (B, 2, h, w) ground truth in the same unit.
        mask: (B, h, w) bool, the supervised cells.

    Returns:
        (B, h, w) distances, and `mask`. The distance of a cell that is not supervised is a constant.
    """
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))  # float64 stays what it is
    error = flow - target.to(flow.dtype)
    # The root's gradient is infinite at zero error, and NaN times a zero mask is NaN: mask before the norm.
    error = torch.where(mask.unsqueeze(1), error, torch.ones_like(error))
    return torch.linalg.vector_norm(error, dim=1), mask


def means(terms: dict[str, Term]) -> dict[str, Tensor]:
    """Mean of each term's values where they count, over the batch of all processes together; zero where none counts.

    Distributed training averages the gradients of its processes, whose counts differ. So a process divides its sum by
    the processes' average count; the average of these shares is the mean on the joined batch. A collective call,
    with the same terms in every process.
    """
    counts = over_processes(torch.stack([where.sum() for _, where in terms.values()])).clamp(min=1)
    sums = {name: (values * where).sum() for name, (values, where) in terms.items()}
    return {name: processes() * total / count for (name, total), count in zip(sums.items(), counts, strict=True)}


def weighted_means(terms: dict[str, Term], weights: dict[str, float]) -> dict[str, Tensor]:
    """`means` of the terms, and their weighted sum as `loss`."""
    found = means(terms)
    return {"loss": torch.stack([weights[name] * mean for name, mean in found.items()]).sum(), **found}


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values where they count, see `means`."""
    return means({"": (values, where)})[""]


def pair_means(values: Tensor, where: Tensor) -> Term:
    """Mean (B,) of each pair's values (B, ...) where they count, zero if none does; and which pairs have any (B,)."""
    count = where.flatten(1).sum(1)
    return torch.where(where, values, 0).flatten(1).sum(1) / count.clamp(min=1), count > 0


def over_processes(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without a gradient."""
    x = x.detach().clone()
    if processes() > 1:
        dist.all_reduce(x)
    return x


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def next_in_batch(x: Tensor) -> Tensor:
    """Each pair's next neighbour in the whole batch, the first after the last: x (B, ...) -> (B, ...), with gradient.

    Process r of P has the pairs r, r + P, ... of the joined batch. A collective call.
    """
    if processes() == 1:
        return x.roll(-1, 0)
    parts = dist.nn.functional.all_gather(x.contiguous())
    joined = torch.stack(parts, dim=1).flatten(0, 1)  # (B * P, ...)
    return joined.roll(-1, 0)[dist.get_rank() :: processes()]
