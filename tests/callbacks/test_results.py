"""Result files are written atomically; errors name folders and pictures."""

import json

import pytest

from corrzoo import callbacks
from corrzoo.callbacks import results
from corrzoo.types import ZooError


def test_files_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "r.json"
    results.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def full_disk(self, text, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        results.write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}


def test_csv_columns_are_the_keys(tmp_path):
    results.write_csv(tmp_path / "r.csv", [{"index": 0, "pck": 50.0}, {"index": 1, "pck": 25.0}])
    assert (tmp_path / "r.csv").read_text() == "index,pck\n0,50.0\n1,25.0\n"


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"cannot write results into .*file"):
        results.writable(tmp_path / "file" / "results")


def test_an_unknown_picture_suggests_the_nearest():
    with pytest.raises(ZooError, match="kinds: unknown 'flows': did you mean 'flow'"):
        callbacks.MatchImages(kinds=["flows"])
    with pytest.raises(ZooError, match="stages: unknown 'training'"):
        callbacks.MatchImages(stages=["training"])
