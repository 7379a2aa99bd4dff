"""PCK of validation pairs at stated steps of a training, as a callback of `lightning fit`."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from corrzoo.files import write_text
from corrzoo.matcher import Matcher
from corrzoo.scoring.evaluation import Evaluation


class Curve(Callback):
    """Score the validation pairs at some steps, and write `{pairs seen: {"pck@0.05": percent, ...}}`.

    Args:
        path: The JSON file. A resumed run adds to it.
        steps: Optimiser steps after which to score; 0 scores before training.
    """

    def __init__(self, path: str, steps: list[int]) -> None:
        self.path, self.steps = Path(path), steps

    def on_train_start(self, trainer: Trainer, pl_module: Matcher) -> None:  # type: ignore[override]
        if trainer.global_step == 0:
            self._score(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Matcher, *_: Any) -> None:  # type: ignore[override]
        self._score(trainer, pl_module)

    @torch.no_grad()
    def _score(self, trainer: Trainer, matcher: Matcher) -> None:
        if trainer.global_step not in self.steps:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader, options = data.val_dataloader(), matcher.hparams
        evaluation = Evaluation(matcher, loader, options.protocol, options.alphas, options.feature_cache_mb)
        matcher.eval()
        for pair in loader:
            evaluation.score(trainer.strategy.batch_to_device(pair), 0)
        matcher.train()
        curve = json.loads(self.path.read_text()) if self.path.exists() else {}
        scores = {name.removeprefix("val/"): value for name, value in evaluation.scores("val").items()}
        curve[trainer.global_step * data.hparams.batch_size] = scores
        write_text(self.path, json.dumps(curve, indent=1) + "\n")
