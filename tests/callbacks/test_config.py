"""The configuration of a run is in its folder, whole."""

import errno

import pytest
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from corrzoo.callbacks.config import SaveConfig
from corrzoo.callbacks.folder import name_run


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


@pytest.mark.parametrize(("name", "folder"), [("", "Baseline-vit"), (None, "")])
def test_an_evaluation_is_named_after_the_run_that_it_evaluates(tmp_path, name, folder):
    """A logger without a name writes its runs directly into its folder."""
    for version in ("version_3-test", "version_3-test-2", "version_3-test-3"):
        options = Namespace(save_dir="", name=name, version=None)
        logger = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=options)
        config = Namespace(
            trainer=Namespace(logger=logger, default_root_dir=None, fast_dev_run=False),
            model=Namespace(class_path="corrzoo.heads.baseline.Baseline", init_args=Namespace(backbone="vit")),
            ckpt_path=str(tmp_path / "version_3" / "checkpoints" / "best.ckpt"),
        )
        name_run(config, "test", tmp_path)
        assert options.version == version
        (tmp_path / folder / version).mkdir(parents=True)
