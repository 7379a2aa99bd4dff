"""Two training processes of one command end together, whoever is stopped or killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

FIT = [
    *("fit", "--model=Baseline", "--model.backbone=timm/test_vit.r160_in1k", "--model.weights=random"),
    *("--data.train=synthetic", "--data.image_size=64", "--data.batch_size=4", "--data.num_workers=1"),
    *("--data.options={synthetic: {length: {trn: 16, val: 2}}}", "--trainer.max_epochs=100000"),
    *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"),
    *("--trainer.enable_progress_bar=false", "--checkpoint.dirpath=kept", "--checkpoint.last_every_n_steps=1"),
]
PATIENCE = 240
"""Seconds on a busy machine."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux ends orphans")


class Command:
    """`corrzoo fit` in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.main = subprocess.Popen(
                [sys.executable, "-m", "corrzoo", *FIT], cwd=folder, stdout=log, stderr=log, start_new_session=True
            )

    def processes(self) -> list[int]:
        """Running processes of the session."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it has ended
                continue
            found += [int(path.name)] if int(session) == self.main.pid and state not in "ZX" else []
        return found

    def wait_for(self, reached: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < end, f"still running: {self.processes()}\n{self.log.read_text()}"
            time.sleep(0.05)

    def starts_the_second_process(self) -> bool:
        """Whether it imports torch by now."""
        others = [pid for pid in self.processes() if pid != self.main.pid]
        return any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in others)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    running = Command(tmp_path)
    yield running
    for pid in running.processes():
        os.kill(pid, signal.SIGKILL)
    running.main.wait()


@pytest.mark.parametrize("name, to_all", [("SIGTERM", True), ("SIGINT", True), ("SIGTERM", False)])
def test_a_signal_saves_a_checkpoint_and_ends_all_processes(
    command: Command, tmp_path: Path, name: str, to_all: bool
) -> None:
    number = getattr(signal, name)
    command.wait_for((tmp_path / "kept" / "last.ckpt").exists)
    (os.killpg if to_all else os.kill)(command.main.pid, number)
    assert command.main.wait(PATIENCE) == 128 + number, command.log.read_text()
    command.wait_for(lambda: not command.processes())
    log = command.log.read_text()
    (step,) = re.findall(rf"interrupted \({name}\) after step (\d+); resume with --ckpt_path last", log)
    assert torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["global_step"] == int(step)
    assert "Traceback" not in log, log


@pytest.mark.parametrize("training", [False, True])
def test_no_process_outlives_a_killed_first_process(command: Command, tmp_path: Path, training: bool) -> None:
    last = tmp_path / "kept" / "last.ckpt"
    command.wait_for(last.exists if training else command.starts_the_second_process)
    assert training or not last.exists()
    command.main.kill()
    command.main.wait()
    end = time.monotonic() + PATIENCE / 4  # the rendezvous alone would wait for half an hour
    command.wait_for(lambda: time.monotonic() > end or not command.processes())
    assert not command.processes()
