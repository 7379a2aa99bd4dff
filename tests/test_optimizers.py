"""Learning rates by step, as training applies them, and after a resume."""

import math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import corrzoo
from corrzoo.errors import ZooError
from corrzoo.optimizers import create_optimizer, warmup_cosine
from test_matcher import TINY, data, trainer

STEPS_PER_EPOCH = 3


def cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


TOP, LAST = 0.3 * 9 - 1, 8
ONE_CYCLE = [cosine(1 / 25, 1, k / TOP) if k < TOP else cosine(1, 4e-6, (k - TOP) / (LAST - TOP)) for k in range(9)]
"""From a 25th of the rate to the rate after 0.3 of the steps, then to a 250,000th of it."""


def rates(tmp_path, epochs=3, **options):
    """The head's learning rate at each step of a training of three steps an epoch."""
    model = corrzoo.create_matcher("Baseline", **TINY, lr=1.0, backbone_lr=1.0, **options)
    seen = []

    def note(*_):
        seen.append(model.optimizers().param_groups[0]["lr"])

    model.on_train_batch_start = note
    trainer(tmp_path, max_epochs=epochs, limit_val_batches=0).fit(model, data(trn=4 * STEPS_PER_EPOCH))
    return seen


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(schedule="constant"), [1.0] * 9),
        (dict(schedule="step", milestones=[1, 2], gamma=0.1), [1.0] * 3 + [0.1] * 3 + [0.01] * 3),
        (dict(schedule="cosine"), [0.5 + 0.5 * math.cos(math.pi * k / 9) for k in range(9)]),
        (dict(schedule="one-cycle"), ONE_CYCLE),
        (dict(schedule="constant", warmup_steps=3), [0.25, 0.5, 0.75] + [1.0] * 6),
        (
            dict(schedule="cosine", warmup_steps=3),
            [0.25, 0.5, 0.75] + [0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(6)],
        ),
    ],
)
def test_schedule_sets_the_rate_of_every_step(tmp_path, options, expected):
    assert rates(tmp_path, **options) == pytest.approx(expected)


def test_a_one_cycle_schedule_is_not_resumed_for_another_number_of_steps(tmp_path):
    def fit(epochs, **options):
        model = corrzoo.create_matcher("Baseline", **TINY, schedule="one-cycle")
        run = trainer(tmp_path, max_epochs=epochs, limit_val_batches=0)
        run.fit(model, data(trn=4 * STEPS_PER_EPOCH), **options)
        return run

    fit(2).save_checkpoint(last := tmp_path / "last.ckpt")
    with pytest.raises(ZooError, match="schedule has 6 steps, this training 9: resume with the epochs"):
        fit(3, ckpt_path=last)
    assert fit(2, ckpt_path=last).global_step == 6


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_a_schedule_over_a_training_without_end_is_refused(tmp_path, schedule):
    with pytest.raises(ZooError, match=f"schedule {schedule} needs the number of steps: set --trainer.max_epochs"):
        rates(tmp_path, epochs=-1, schedule=schedule)


def test_warmup_longer_than_training_stays_below_the_full_rate():
    factor = warmup_cosine(10, lambda: 5)
    assert [factor(k) for k in (0, 4)] == pytest.approx([1 / 11, 5 / 11])
    assert factor(10) == 1.0 and factor(11) == 0.0


def test_optimiser_is_not_fused_on_a_cpu():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = create_optimizer("adamw", [{"params": [parameter], "lr": 0.1}], 0.01, clips=False)
    assert isinstance(optimizer, torch.optim.AdamW) and not optimizer.defaults["fused"]
    assert optimizer.defaults["weight_decay"] == 0.01


@pytest.mark.parametrize("clips", [False, True])
def test_optimiser_is_fused_on_a_gpu_unless_gradients_are_clipped(clips):
    """In mixed precision, Lightning refuses to clip gradients for a fused optimiser."""
    parameter = SimpleNamespace(is_cuda=True)
    with patch("corrzoo.optimizers.AdamW") as kind:
        create_optimizer("adamw", [{"params": [parameter], "lr": 0.1}], 0.01, clips)
    assert kind.call_args.kwargs["fused"] is (None if clips else True)


def test_a_training_that_clips_gradients_says_so(tmp_path):
    """A step in bfloat16 with clipped gradients, with the optimiser that a GPU gets."""

    def on_gpu(name, groups, weight_decay, clips):
        return torch.optim.Adam(groups, weight_decay=weight_decay, fused=None if clips else True)

    with patch("corrzoo.matcher.create_optimizer", on_gpu):
        run = trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0, max_steps=1, limit_val_batches=0)
        run.fit(corrzoo.create_matcher("Baseline", **TINY), data())
    assert run.global_step == 1
