"""Results, predictions and pictures of a run; what cannot be written is known before it."""

import csv
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from corrzoo import callbacks
from corrzoo.callbacks.lock import FolderLock
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


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_folder_that_cannot_be_written_is_known_before_the_first_pair(tmp_path, monkeypatch, command):
    monkeypatch.setattr(Matcher, f"{command}_step", lambda *_: pytest.fail("evaluated"))
    (tmp_path / "file").touch()
    trainer = quiet(tmp_path, callbacks=[callbacks.ResultsWriter(str(tmp_path / "file" / "results"))])
    with pytest.raises(ZooError, match="cannot write results into"):
        getattr(trainer, command)(create_matcher("Baseline", **TINY), two_pairs())


def hold(folder: Path, ready: Any) -> None:
    """Be another evaluation, which writes into the same folder."""
    lock = FolderLock()
    lock.claim(folder, "")
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize(("command", "folder"), [("test", "results"), ("predict", "predictions")])
def test_the_folder_of_an_evaluation_that_runs_is_refused(tmp_path, command, folder):
    """Of two evaluations that start together, the second would replace the results of the first."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    other = fork.Process(target=hold, args=(tmp_path / folder, ready))
    other.start()
    assert ready.wait(60)
    model, writer = create_matcher("Baseline", **TINY), callbacks.ResultsWriter(table=False)
    with pytest.raises(ZooError, match=f"another run writes into .*{folder}: start this command again"):
        getattr(quiet(tmp_path, callbacks=[writer]), command)(model, two_pairs())
    other.kill()
    other.join()
    getattr(quiet(tmp_path, callbacks=[writer]), command)(model, two_pairs())
    assert [path.name for path in (tmp_path / folder).glob("*.csv")] == ["synthetic.csv"]
    assert not (tmp_path / folder / ".lock").exists()
