"""Results, predictions and pictures of a run; what cannot be written is known before it."""

import csv
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from corrzoo import callbacks
from corrzoo.callbacks.pictures import spread_evenly
from corrzoo.data.module import PairsDataModule
from corrzoo.heads import create_matcher
from corrzoo.matcher import Matcher
from corrzoo.types import ZooError

TINY = dict(backbone="timm/test_vit.r160_in1k", weights="random")


def quiet(folder: Path, **options) -> Trainer:
    return Trainer(
        default_root_dir=folder, logger=False, accelerator="cpu", devices=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip


def two_pairs() -> PairsDataModule:
    options = {"synthetic": {"length": {"test": 2}}}
    return PairsDataModule(test=["synthetic"], image_size=64, batch_size=1, num_workers=0, options=options)


def test_an_unknown_picture_suggests_the_nearest():
    with pytest.raises(ZooError, match="kinds: unknown 'flows': did you mean 'flow'"):
        callbacks.MatchImages(kinds=["flows"])
    with pytest.raises(ZooError, match="stages: unknown 'training'"):
        callbacks.MatchImages(stages=["training"])


def test_pictures_of_no_pairs_are_refused_before_the_run():
    with pytest.raises(ZooError, match="pairs 0: expected a number above 0"):
        callbacks.MatchImages(pairs=0)


@pytest.mark.parametrize("total", [2, 4, 9, 12, 1000])
def test_pictures_are_of_different_pairs(total):
    chosen = spread_evenly(4, total)
    assert len(set(chosen)) == len(chosen) == min(4, total) and 0 <= min(chosen) <= max(chosen) < total
    assert total < 1000 or chosen == [0, 251, 502, 753]


def test_a_backend_that_cannot_run_is_an_error_before_the_evaluation(tmp_path, monkeypatch):
    """Also of a head that does not use it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(Matcher, "test_step", lambda *_: pytest.fail("evaluated"))
    model = create_matcher("ACTR", **TINY, width=16, depth=1, grid=4, backend="triton")
    with pytest.raises(ZooError, match="triton"):
        quiet(tmp_path).test(model, two_pairs(), verbose=False)


def test_predictions_are_in_the_given_folder_and_of_one_run(tmp_path, monkeypatch):
    """As in a notebook: the first run is interrupted after two pairs, and the second predicts one."""
    writer, model = callbacks.ResultsWriter(str(tmp_path / "mine")), create_matcher("Baseline", **TINY)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Matcher, "on_predict_epoch_end", lambda _: 1 / 0)
        quiet(tmp_path, callbacks=[writer]).predict(model, two_pairs(), return_predictions=False)
    second = quiet(tmp_path, callbacks=[writer], limit_predict_batches=1)
    second.predict(model, two_pairs(), return_predictions=False)
    assert not (tmp_path / "predictions").exists()
    with (tmp_path / "mine" / "predictions" / "synthetic.csv").open() as file:
        assert {row["index"] for row in csv.DictReader(file)} == {"0"}
