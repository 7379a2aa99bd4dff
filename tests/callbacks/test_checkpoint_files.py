"""Checkpoints: whole or not at all, one run a folder, and `last.ckpt` beside the best."""

import errno
import fcntl
import functools
import multiprocessing
import signal
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

import corrzoo
from corrzoo.callbacks.checkpoints import Checkpoints, WholeFiles
from corrzoo.callbacks.signals import Stopped, StopSignals
from corrzoo.data.module import PairsDataModule
from corrzoo.types import ZooError

VIT = "timm/test_vit.r160_in1k"


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = tmp_path / "deeper" / "last.ckpt", torch.save
    WholeFiles().save_checkpoint({"step": 1}, path)

    def full_disk(content: object, file: object) -> None:
        original(content, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(
        ZooError, match=r"cannot write .*last\.ckpt \(No space left.*previous checkpoint is intact.*ckpt_path last"
    ):
        WholeFiles().save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1} and [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def hold(path: Path, ready: Any, done: Any) -> None:
    """Be another run: claim its folder, and start a worker that outlives it."""
    running = Checkpoints(dirpath=path)
    running._claim()
    multiprocessing.get_context("fork").Process(target=done.wait, args=(60,)).start()
    ready.set()
    time.sleep(60)


def test_a_second_run_is_refused_until_the_first_ends_or_is_killed(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)

    def fit(steps: int, start: Path | None = None) -> None:
        keep = Checkpoints(dirpath=tmp_path / "first" if start is None and steps == 1 else tmp_path, filename="best")
        trainer = Trainer(
            max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            devices=1, callbacks=[keep], limit_val_batches=0,
        )  # fmt: skip
        lengths = {"synthetic": {"length": {"trn": 4, "val": 1}}}
        data = PairsDataModule(train="synthetic", image_size=64, batch_size=4, num_workers=0, options=lengths)
        trainer.fit(corrzoo.create_matcher("Baseline", VIT, "random"), data, ckpt_path=start)

    fit(1)  # another folder
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"best.ckpt", "last.ckpt"}
    for start in (None, tmp_path / "first" / "last.ckpt"):
        with pytest.raises(ZooError, match=f"another run writes its checkpoints into {tmp_path}: wait for its end, or"):
            fit(2, start)
        assert {path.name for path in tmp_path.iterdir()} == {"first", ".lock"}
    other.kill()
    other.join()
    fit(2, tmp_path / "first" / "last.ckpt")
    done.set()
    assert {path.name for path in tmp_path.iterdir()} == {"first", "best.ckpt", "last.ckpt"}


def test_a_file_system_without_locks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    Checkpoints(dirpath=tmp_path)._claim()
    Checkpoints(dirpath="memory://bucket")._claim()


def test_a_pickled_checkpoint_from_a_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("owned").touch, ())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for place in (f"http://127.0.0.1:{server.server_port}/evil.ckpt", tmp_path / "evil.ckpt"):
            with pytest.raises(ZooError, match=r"evil\.ckpt is refused"):
                WholeFiles().load_checkpoint(place)
        server.shutdown()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_half_a_checkpoint_is_refused(tmp_path: Path, part: float) -> None:
    torch.save({"state_dict": {"a": torch.zeros(100)}}, path := tmp_path / "a.ckpt")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ZooError, match=r"a\.ckpt is refused: it is damaged"):
        WholeFiles().load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        WholeFiles().load_checkpoint(tmp_path / "b.ckpt")


def test_last_is_written_into_a_remote_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written: list[str] = []
    trainer: Any = SimpleNamespace(
        is_global_zero=True, is_last_batch=False, accumulate_grad_batches=1, world_size=1, global_step=1,
        fast_dev_run=False, save_checkpoint=lambda path, weights_only: written.append(str(path)),
    )  # fmt: skip
    trainer.checkpoint_callback = Checkpoints(dirpath="memory://bucket/run")
    trainer.checkpoint_callback._write_last(trainer)
    stop = StopSignals()
    stop.on_train_start(trainer, trainer)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped):
        stop.on_train_batch_end(trainer, trainer, None, None, 0)
    assert written == ["memory://bucket/run/last.ckpt"] * 2


def test_last_is_written_every_epoch_and_a_resumed_run_copies_the_best(tmp_path: Path) -> None:
    class Model(corrzoo.Matcher):
        """A model whose first epoch is the best."""

        def match(self, src: object, trg: object) -> corrzoo.Match:
            return corrzoo.Match(src.maps[0].sum() * torch.zeros(len(src.image), 2, 4, 4))

        def on_validation_epoch_end(self) -> None:
            self.log("val/pck@0.1", -float(self.current_epoch))

    def run(name: str, epochs: int, start: Path | None = None) -> Path:
        keep = Checkpoints(
            dirpath=tmp_path / name, filename="best", monitor="val/pck@0.1", mode="max", enable_version_counter=False
        )
        trainer = Trainer(
            max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            devices=1, callbacks=[keep], num_sanity_val_steps=0,
        )  # fmt: skip
        lengths = {"synthetic": {"length": {"trn": 4, "val": 1}}}
        data = PairsDataModule(train="synthetic", image_size=64, batch_size=4, num_workers=0, options=lengths)
        trainer.fit(Model(backbone=VIT, weights="random"), data, ckpt_path=start)
        return tmp_path / name

    first = run("first", 2)
    assert [torch.load(first / f"{name}.ckpt")["global_step"] for name in ("best", "last")] == [1, 2]
    second = run("second", 3, first / "last.ckpt")
    assert [torch.load(second / f"{name}.ckpt")["global_step"] for name in ("best", "last")] == [1, 3]


def test_the_checkpoint_of_an_epochs_last_step_is_written_after_validation(tmp_path: Path) -> None:
    happened: list[str] = []

    class Noting(Checkpoints):
        def _write_last(self, trainer: Trainer) -> None:
            happened.append(f"step {trainer.global_step}")

        def on_validation_end(self, *_: object) -> None:
            happened.append("validation")

    keep = Noting(dirpath=tmp_path, last_every_n_steps=1)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        devices=1, callbacks=[keep], num_sanity_val_steps=0,
    )  # fmt: skip
    lengths = {"synthetic": {"length": {"trn": 12, "val": 1}}}
    data = PairsDataModule(train="synthetic", image_size=64, batch_size=4, num_workers=0, options=lengths)
    trainer.fit(corrzoo.create_matcher("Baseline", VIT, "random"), data)
    assert happened == ["step 1", "step 2", "validation", "step 3"]
