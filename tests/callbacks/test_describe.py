"""What a result file says of a run."""

import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import torch
from lightning.pytorch.loops.progress import _BatchProgress

import corrzoo
from corrzoo.callbacks import describe
from corrzoo.heads import create_matcher

TINY = dict(backbone="timm/test_vit.r160_in1k", weights="random")


def test_memory_is_that_of_the_device_that_ran(monkeypatch):
    """On a machine with a GPU, a run on the CPU needs no memory of the GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert describe.peak_memory_mb(torch.device("cpu")) > 10


def test_the_versions_of_a_checkout_that_is_not_installed(monkeypatch):
    """With `src` on PYTHONPATH there is no package of that name."""

    def installed(package):
        if package == "corrzoo":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(describe, "version", installed)
    assert describe.versions()["corrzoo"] == corrzoo.__version__ and describe.versions()["timm"] == version("timm")


def test_the_commit_is_that_of_a_checkout_that_tracks_the_package(tmp_path, monkeypatch):
    """A virtual environment inside another project's repository is not part of it."""

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)

    file = tmp_path / ".venv" / "corrzoo" / "results.py"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(describe, "__file__", str(file))
    commit = describe._commit.__wrapped__
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


def test_pairs_seen_are_those_of_all_batches_and_processes():
    """`batch_size` is that of all processes together. An epoch's last step may accumulate fewer batches."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=_BatchProgress()))
    loop.epoch_loop.batch_progress.total.ready = 28
    data = SimpleNamespace(hparams={"train": "synthetic", "batch_size": 16})
    trainer = SimpleNamespace(global_step=10, world_size=2, max_epochs=1, max_steps=-1, datamodule=data, fit_loop=loop)
    trainer.lightning_module = SimpleNamespace(before=None)
    assert describe.describe_training(trainer)["pairs_seen"] == 28 * 16
    trainer.datamodule = None
    assert describe.describe_training(trainer)["pairs_seen"] is None
    trainer.global_step = 0
    assert describe.describe_training(trainer) is None


def test_a_checkpoint_from_an_address_has_no_checksum(tmp_path):
    """Its content was read by Lightning, and is not read again."""
    model = create_matcher("Baseline", **TINY)
    (tmp_path / "a.ckpt").write_bytes(b"abc")
    known = {"datamodule": None, "precision": "32-true", "world_size": 1}
    for place, checksum in ((tmp_path / "a.ckpt", hashlib.sha256(b"abc").hexdigest()), ("https://a.b/a.ckpt", None)):
        found = describe.describe_run(SimpleNamespace(ckpt_path=place, **known), model, "synthetic")
        assert (found["checkpoint"], found["checkpoint_sha256"]) == (str(place), checksum)
