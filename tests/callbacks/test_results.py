"""Result files are written atomically; errors name folders and pictures."""

import csv
import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _BatchProgress

from corrzoo import callbacks
from corrzoo.callbacks import results
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


def test_files_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "r.json"
    results.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def full_disk(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        results.write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}


def test_csv_columns_are_the_keys(tmp_path):
    results.write_csv(tmp_path / "r.csv", [{"index": 0, "pck": 50.0}, {"index": 1, "pck": 25.0}])
    assert (tmp_path / "r.csv").read_text() == "index,pck\n0,50.0\n1,25.0\n"
    results.write_csv(tmp_path / "r.csv", [], ("index", "pck"))
    assert (tmp_path / "r.csv").read_text() == "index,pck\n"


def test_memory_is_that_of_the_device_that_ran(monkeypatch):
    """On a machine with a GPU, a run on the CPU needs no memory of the GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert results._peak_memory_mb(torch.device("cpu")) > 10


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"cannot write results into .*file"):
        results.writable(tmp_path / "file" / "results")


def test_the_commit_is_that_of_a_checkout_that_tracks_the_package(tmp_path, monkeypatch):
    """A virtual environment inside another project's repository is not part of it."""

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)

    file = tmp_path / ".venv" / "corrzoo" / "results.py"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(results, "__file__", str(file))
    commit = results._commit.__wrapped__
    assert commit() is None
    git("init")
    git("commit", "--allow-empty", "-m", "empty")
    assert commit() is None
    git("add", ".")
    git("commit", "-m", "all")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert commit() == head
    file.write_text("changed")
    assert commit() == f"{head}+"
    monkeypatch.setenv("PATH", "")
    assert commit() is None


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


def test_pairs_seen_are_those_of_all_batches_and_processes():
    """`batch_size` is that of all processes together. An epoch's last step may accumulate fewer batches."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=_BatchProgress()))
    loop.epoch_loop.batch_progress.total.ready = 28
    data = SimpleNamespace(hparams={"train": "synthetic", "batch_size": 16})
    trainer = SimpleNamespace(global_step=10, world_size=2, max_epochs=1, max_steps=-1, datamodule=data, fit_loop=loop)
    trainer.lightning_module = SimpleNamespace(before=None)
    assert results.describe_training(trainer)["pairs_seen"] == 28 * 16
    trainer.datamodule = None
    assert results.describe_training(trainer)["pairs_seen"] is None
    trainer.global_step = 0
    assert results.describe_training(trainer) is None


def test_a_checkpoint_from_an_address_has_no_checksum(tmp_path):
    """Its content was read by Lightning, and is not read again."""
    model = create_matcher("Baseline", **TINY)
    (tmp_path / "a.ckpt").write_bytes(b"abc")
    known = {"datamodule": None, "precision": "32-true", "world_size": 1}
    for place, checksum in ((tmp_path / "a.ckpt", hashlib.sha256(b"abc").hexdigest()), ("https://a.b/a.ckpt", None)):
        found = results.describe_run(SimpleNamespace(ckpt_path=place, **known), model, "synthetic")
        assert (found["checkpoint"], found["checkpoint_sha256"]) == (str(place), checksum)


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
