"""A run resumed from any of its checkpoints ends with the same weights, for any number of workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import write_synthetic_spair
from lightning.pytorch import Callback, Trainer, seed_everything

import corrzoo
from corrzoo.callbacks.checkpoints import Checkpoints
from corrzoo.data.module import PairsDataModule
from corrzoo.store.checkpoints import read_checkpoint

VIT = "timm/test_vit.r160_in1k"
CASES = {
    "LPMFlow": {"grid": 4, "depth": 1, "pfsr": "off", "mmfi": False},  # dropout, hidden tokens, a falling lambda
    "GSF": {"grid": 4, "stage1": 0.45},  # the second stage begins within the second epoch
    "ACTR, frozen CNN": {
        **{"backbone": "efficientnet_lite0", "finetune": "none", "grid": 4, "depth": 1, "width": 32},
        "levels": ["blocks.2.1", "blocks.4.2"],
    },  # its feature cache is empty after a resume
    "Baseline, one-cycle": {"schedule": "one-cycle"},  # its rates need the number of steps of the whole training
}


class KeepAll(Callback):
    """Save a checkpoint at every place where a run can be resumed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, trainer: Trainer, place: str) -> None:
        trainer.save_checkpoint(self.folder / f"{place}{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.keep(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        self.keep(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: object) -> None:
        self.keep(trainer, "epoch")


def fit(folder: Path, case: str, start: str | None = None, workers: int = 0) -> tuple[corrzoo.Matcher, Trainer]:
    """Train three epochs of three steps. 14 pairs are not a multiple of the batch size 4."""
    seed_everything(3)
    options = {"backbone": VIT, "schedule": "cosine", "lr": 1e-3} | CASES[case]
    model = corrzoo.create_matcher(case.split(",")[0], weights="random", **options)
    reuses = options.get("finetune") == "none"
    if reuses and not (folder / "SPair-71k").exists():
        write_synthetic_spair(folder, pairs_per_split=14, images_per_category=3, size=64)
    data = PairsDataModule(
        train="spair71k" if reuses else "synthetic", root=str(folder), image_size=64, batch_size=4, num_workers=workers,
        augment="none" if reuses else "cats", options={"synthetic": {"length": {"trn": 14, "val": 5}}}, packed=False,
    )  # fmt: skip
    trainer = Trainer(
        # with max_steps, Lightning resumes in another way
        max_epochs=3, max_steps=9 if case == "LPMFlow" else -1,
        logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        devices=1, enable_checkpointing=False, callbacks=[] if start else [KeepAll(folder)], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=folder / f"{start}.ckpt" if start else None)
    return model, trainer


@pytest.fixture(scope="module", params=CASES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, request.param, *fit(folder, request.param)


@pytest.mark.parametrize(
    "start, workers", [("batch2", 0), ("batch4", 2), ("batch6", 0), ("epoch3", 2), ("validation3", 0)]
)
def test_a_resumed_run_ends_with_bit_identical_weights(whole: tuple, start: str, workers: int) -> None:
    folder, case, model, trainer = whole
    again, resumed = fit(folder, case, start, workers)
    assert resumed.global_step == trainer.global_step == 9
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert torch.equal(torch.get_rng_state(), torch.load(folder / "epoch9.ckpt")["random"]["cpu"])


def test_the_same_seed_gives_the_same_run_for_any_number_of_workers(whole: tuple, tmp_path: Path) -> None:
    _, case, model, _ = whole
    again, _ = fit(tmp_path, case, workers=2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_validation_of_the_checkpoint_gives_the_logged_scores(whole: tuple) -> None:
    folder, _, _, trainer = whole
    fresh = corrzoo.load(folder / "epoch9.ckpt")
    quiet = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
    (scores,) = quiet.validate(fresh, trainer.datamodule, verbose=False)
    assert scores == {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert len(scores) == 3


class Course(Callback):
    """Notes steps and validations, and stops training in a hook at a step, as `max_time` and early stopping do."""

    def __init__(self, hook: str = "", step: int = 0) -> None:
        self.hook, self.step, self.noted = hook, step, []

    def note(self, trainer: Trainer, what: str, hook: str) -> None:
        self.noted.append(f"{what} {trainer.global_step}")
        trainer.should_stop |= hook == self.hook and trainer.global_step == self.step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.note(trainer, "step", "on_train_batch_end")

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        self.note(trainer, "validation", "on_validation_end")


def course(folder: Path, *callbacks: Callback, start: Path | None = None, **options: Any) -> list[str]:
    """Train with three steps in an epoch, and return what happened in which order."""
    seed_everything(0)
    notes = next((c for c in callbacks if isinstance(c, Course)), Course())
    trainer = Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
        callbacks=[notes, *(c for c in callbacks if c is not notes), Checkpoints(dirpath=folder)],
        num_sanity_val_steps=0, **options,
    )  # fmt: skip
    lengths = {"synthetic": {"length": {"trn": 12, "val": 1}}}
    data = PairsDataModule(train="synthetic", image_size=64, batch_size=4, num_workers=0, options=lengths)
    trainer.fit(corrzoo.create_matcher("Baseline", VIT, "random", backbone_lr=1e-3), data, ckpt_path=start)
    return notes.noted


def assert_same_last(first: Path, second: Path) -> None:
    """Whether both folders' last checkpoints have the same weights."""
    weights, others = (torch.load(folder / "last.ckpt")["state_dict"] for folder in (first, second))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


@pytest.mark.parametrize("first", [3, 4])  # at the end and in the middle of an epoch
def test_a_run_that_max_steps_ended_resumes(tmp_path: Path, first: int) -> None:
    course(tmp_path / "whole", max_steps=7)
    course(tmp_path / "first", max_steps=first)
    course(tmp_path / "second", start=tmp_path / "first" / "last.ckpt", max_steps=7)
    assert_same_last(tmp_path / "whole", tmp_path / "second")


@pytest.mark.parametrize("hook, step", [("on_train_batch_end", 4), ("on_train_batch_end", 5), ("on_validation_end", 5)])
def test_a_run_that_was_stopped_within_an_epoch_continues_there(tmp_path: Path, hook: str, step: int) -> None:
    whole = course(tmp_path / "whole", max_epochs=2, val_check_interval=2)
    assert whole == ["step 1", "step 2", "validation 2", "step 3", "step 4", "step 5", "validation 5", "step 6"]
    first = course(tmp_path / "first", Course(hook, step), max_epochs=2, val_check_interval=2)
    assert first[-2:] == [f"step {step}", f"validation {step}"]
    assert read_checkpoint(tmp_path / "first" / "last.ckpt").epochs == 1
    second = course(tmp_path / "second", start=tmp_path / "first" / "last.ckpt", max_epochs=2, val_check_interval=2)
    assert first[:-1] + second == whole if step == 4 else first + second == whole
    assert_same_last(tmp_path / "whole", tmp_path / "second")


@pytest.mark.parametrize(
    "start, options",
    [
        ("batch2", {"val_check_interval": 2}),
        ("validation2", {"val_check_interval": 2}),
        ("batch4", {"val_check_interval": 4, "check_val_every_n_epoch": None}),
    ],
)
def test_a_validation_that_was_due_is_made_after_the_resume_and_once(
    tmp_path: Path, start: str, options: dict[str, Any]
) -> None:
    whole = course(tmp_path / "whole", KeepAll(tmp_path), max_epochs=2, **options)
    again = course(tmp_path / "again", start=tmp_path / f"{start}.ckpt", max_epochs=2, **options)
    saved = start.replace("batch", "step ").replace("validation", "validation ")
    assert again == whole[whole.index(saved) + 1 :]
    assert_same_last(tmp_path / "whole", tmp_path / "again")
