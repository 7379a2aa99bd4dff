"""`--model.compile true`: torch.compile for the backbones and the head."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from corrzoo.backbones import Backbone

PARTS = ("prepare", "match", "match_points")
"""Methods of a head that are compiled. Losses and scoring are not: they are small, and sum over processes."""


class Compile(Callback):
    """Compile a matcher in place before it trains or is evaluated, if its option `compile` is set.

    An evaluation on a GPU that is not part of a training runs as CUDA graphs.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compile(pl_module, graphs=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._compile(pl_module, graphs=pl_module.device.type == "cuda")

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(self, *_: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _compile(self, matcher: LightningModule, graphs: bool) -> None:
        if not matcher.hparams.get("compile"):
            return
        options: dict[str, Any] = {"mode": "reduce-overhead"} if graphs else {}
        for module in matcher.modules():
            if isinstance(module, Backbone):
                module.compile(**options)
        for name in PARTS:
            method = getattr(type(matcher), name).__get__(matcher)  # as written, if it was compiled before
            setattr(matcher, name, torch.compile(method, **options))
