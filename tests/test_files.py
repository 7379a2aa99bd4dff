"""Files appear when they are complete."""

import json
import threading

import pytest

from corrzoo.files import whole_file, writable, write_json
from corrzoo.types import ZooError


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "file.txt"
    with whole_file(path) as partial:
        assert partial.parent == tmp_path and partial != path
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_an_exception_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"), whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_do_not_interfere(tmp_path):
    path, contents, errors = tmp_path / "file.txt", [letter * 100_000 for letter in "abcd"], []
    path.write_text(contents[0])

    def write(content):
        try:
            for _ in range(20):
                with whole_file(path) as partial:
                    partial.write_text(content)
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in contents
    assert not errors and list(tmp_path.iterdir()) == [path]


def test_files_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "r.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def full_disk(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"cannot write results into .*file"):
        writable(tmp_path / "file" / "results")
