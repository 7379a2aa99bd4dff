"""`--model.compile true`: torch.compile for the backbones and the head."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from corrzoo.backbones import Backbone

PER_IMAGE, PER_PAIR = ("prepare",), ("match", "match_points")
"""Methods of a head that are compiled. Losses and scoring are not: they are small, and sum over processes."""


def compile_matcher(matcher: LightningModule, graphs: bool = False) -> None:
    """Compile the backbones and the head in place.

    With `graphs`, `match` and `match_points` run as CUDA graphs. Their results are valid until the next batch. The
    backbone has none: evaluation gives it the images that are not in the feature cache, any number of them.
    """
    for module in matcher.modules():
        if isinstance(module, Backbone):
            module.compile()
    for name in PER_IMAGE + PER_PAIR:
        method = getattr(type(matcher), name).__get__(matcher)  # not compiled, if `matcher` was compiled before
        options: dict[str, Any] = {"mode": "reduce-overhead"} if graphs and name in PER_PAIR else {}
        setattr(matcher, name, torch.compile(method, **options))


class Compile(Callback):
    """Compile a matcher before it trains or is evaluated, if its option `compile` is set.

    An evaluation on a GPU runs as CUDA graphs, except the validation within a training.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.hparams.get("compile"):
            compile_matcher(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.hparams.get("compile") and trainer.state.fn != "fit":
            compile_matcher(pl_module, graphs=pl_module.device.type == "cuda")

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
