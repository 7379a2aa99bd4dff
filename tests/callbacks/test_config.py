"""The configuration of a run is in its folder, whole."""

import errno

import pytest
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from corrzoo.callbacks.config import SaveConfig


def saver(folder, **values):
    parser = LightningArgumentParser()
    parser.add_argument("--a", type=int)
    parser.add_argument("--b", type=int)
    callback = SaveConfig(parser, Namespace(), Namespace(**values))
    callback.folder = folder
    return callback


def test_a_failed_write_leaves_the_previous_configuration(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    saver(folder, a=1, b=2).save_config(None, None, "fit")
    assert (folder / "config.yaml").read_text().split() == ["a:", "1", "b:", "2"]

    def fill_the_disk(config, path, **_):
        with open(path, "w") as file:
            file.write("a: 3\n")
        raise OSError(errno.ENOSPC, "No space left on device")

    callback = saver(folder, a=3, b=4)
    monkeypatch.setattr(callback.parser, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        callback.save_config(None, None, "fit")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert (folder / "config.yaml").read_text().split() == ["a:", "1", "b:", "2"]
