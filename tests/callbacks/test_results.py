"""Result files are written atomically; errors name folders and pictures."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loops.progress import _BatchProgress

from corrzoo import callbacks
from corrzoo.callbacks import results
from corrzoo.callbacks.pictures import spread_evenly
from corrzoo.types import ZooError


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
