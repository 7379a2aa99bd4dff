"""Optimisers and learning-rate schedules, by the options of `Matcher`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR

from corrzoo.errors import ZooError


def create_optimizer(name: str, groups: list[dict[str, Any]], weight_decay: float, clips: bool) -> Optimizer:
    """Adam or AdamW; the fused kernel where all parameters are on a GPU.

    Not where gradients are clipped (`clips`): in mixed precision, Lightning refuses it there.
    """
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    kind = {"adam": Adam, "adamw": AdamW}[name]
    return kind(groups, weight_decay=weight_decay, fused=True if on_gpu and not clips else None)


def create_schedule(options: Any, optimizer: Optimizer, trainer: Trainer) -> LRSchedulerConfigType | None:
    """The schedule of the options `schedule`, `warmup_steps`, `milestones` and `gamma`; None if the rate is constant.

    `cosine`, `one-cycle` and the warm-up change the rate at every step, `step` after an epoch.

    Raises:
        ZooError: if the schedule needs the number of steps, see `total_steps`.
    """
    asks = f"schedule {options.schedule}"
    if options.schedule == "step":
        by_epoch = MultiStepLR(optimizer, options.milestones or [], options.gamma)
        return {"scheduler": by_epoch, "interval": "epoch"}
    if options.schedule == "one-cycle":
        # It needs the number now, so Lightning makes the loaders early, see below; a resume is exact all the same.
        rates = [group["lr"] for group in optimizer.param_groups]
        return {"scheduler": OneCycle(optimizer, rates, total_steps(trainer, asks)), "interval": "step"}
    if options.schedule == "constant" and not options.warmup_steps:
        return None
    # Asked for at a step: asked for here, Lightning would make the loaders before it has read a checkpoint to resume.
    total = partial(total_steps, trainer, asks) if options.schedule == "cosine" else None
    return {"scheduler": LambdaLR(optimizer, warmup_cosine(options.warmup_steps, total)), "interval": "step"}


def total_steps(trainer: Trainer, option: str) -> int:
    """Optimiser steps of the whole training; `option` names what needs the number.

    Raises:
        ZooError: if the training has no end.
    """
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise ZooError(f"{option} needs the number of steps: set --trainer.max_epochs or --trainer.max_steps")
    return int(steps)


class OneCycle(OneCycleLR):
    """`OneCycleLR` that refuses to be resumed for another number of steps, which torch finds out at the last one.

    Raises:
        ZooError: if the checkpoint's schedule has another length.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (planned := state_dict["total_steps"]) != self.total_steps:
            raise ZooError(
                f"the checkpoint's one-cycle schedule has {planned} steps, this training {self.total_steps}: "
                "resume with the epochs, pairs and batch size that the training began with"
            )
        super().load_state_dict(state_dict)


def warmup_cosine(warmup: int, total: Callable[[], int] | None) -> Callable[[int], float]:
    """Factor of the learning rate by step: a linear rise over `warmup` steps, then half a cosine, zero at `total`.

    Without `total`, the rate is constant after the warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if step == warmup or total is None:
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * min((step - warmup) / max(total() - warmup, 1), 1.0))

    return factor
