"""Runs that are killed, stopped or out of disk space resume, and end like an uninterrupted run."""

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import write_synthetic_spair

from processes import obey_permissions

VIT = "timm/test_vit.r160_in1k"
FIT = [
    *("fit", "--model=LPMFlow", f"--model.backbone={VIT}", "--model.weights=random", "--model.grid=4"),
    *("--model.depth=1", "--model.pfsr=off", "--model.mmfi=false", "--model.lr=1e-3", "--model.schedule=cosine"),
    *("--data.train=spair71k", "--data.root=data"),
    *(
        "--data.download=false",
        "--data.image_size=64",
        "--data.batch_size=4",
        "--data.num_workers=1",
        "--data.augment=cats",
    ),
    *("--trainer.max_epochs=5", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger.save_dir=runs"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]
STEPS = 5 * 2


def run(
    folder: Path, args: list[str], trouble: Callable[[], None] | None = None, then: str = "", to_all: bool = False
) -> tuple[int, str]:
    """Run a command line in a process of its own.

    Args:
        folder: Working folder.
        args: Command line.
        trouble: Called in the process before the command starts.
        then: Name of a signal that is sent during a step.
        to_all: Send it to the loaders' workers, too, as Ctrl-C, systemd and scancel do.

    Returns:
        Exit status, negative for a signal, and output.
    """
    context = multiprocessing.get_context("forkserver")  # which imports everything once, for all runs
    context.set_forkserver_preload(["corrzoo.cli"])
    log = folder / "log"
    process = context.Process(target=command, args=(folder, args, trouble, dict(os.environ)))
    process.start()
    if then:
        while not (folder / "steps").exists() and process.is_alive():
            time.sleep(0.01)
        (os.killpg if to_all else os.kill)(process.pid, getattr(signal, then))
    process.join(timeout=600)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also a loader's worker that did not see its parent being killed
    process.join()
    return process.exitcode, log.read_text()


def command(folder: Path, args: list[str], trouble: Callable[[], None] | None, environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loaders, as in any other process
    os.setsid()
    os.environ |= environment
    os.chdir(folder)
    torch.set_num_threads(1)
    with open("log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if trouble:
        trouble()
    from corrzoo.cli import main

    main(args)
    Path("seconds").write_text(str(time.process_time()))


class KilledAfter:
    """Send SIGKILL after some CPU time of the process, which does not depend on the load of the machine."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        def watch() -> None:
            while time.process_time() < self.seconds:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()


class KilledWriting:
    """Send SIGKILL when half of a file is written: the n-th checkpoint or annotation cache."""

    def __init__(self, what: str, n: int = 1) -> None:
        self.what, self.n = what, n

    def __call__(self) -> None:
        owner, name = {"checkpoint": (torch, "save"), "annotations": (np, "savez")}[self.what]
        original, left = getattr(owner, name), self.n

        def write(*args: object, **options: object) -> None:
            nonlocal left
            left -= 1
            original(*args, **options)
            if not left:
                target = args[1] if self.what == "checkpoint" else args[0]
                file = target if hasattr(target, "truncate") else open(target, "r+b")
                file.truncate(file.seek(0, os.SEEK_END) // 2)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, write)


def newest(folder: Path, name: str = "last.ckpt", run: str = "runs/*/*") -> Path:
    return max(folder.glob(f"{run}/checkpoints/{name}"), key=lambda path: path.stat().st_mtime)


def resume(folder: Path) -> list[str]:
    """Command line that resumes if there is a checkpoint."""
    return [*FIT, "--ckpt_path=last"] if list(folder.glob("runs/*/*/checkpoints/last.ckpt")) else FIT


def assert_same(a: object, b: object, at: str = "") -> None:
    """Compare two checkpoints bit by bit, except for paths and times."""
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            if key != "callbacks":
                assert_same(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, at


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    write_synthetic_spair(folder / "data", pairs_per_split=8, images_per_category=3, size=64)
    assert run(folder, FIT)[0] == 0
    assert read(newest(folder))["global_step"] == STEPS
    return folder


@pytest.fixture
def fresh(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the same dataset, an empty cache and no runs."""
    monkeypatch.setenv("CORRZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").symlink_to(home / "data")
    return tmp_path


def test_a_run_killed_ten_times_ends_like_an_uninterrupted_run(home: Path, fresh: Path) -> None:
    whole, seconds = newest(home), float((home / "seconds").read_text())
    moments, kills = random.Random(0), 0
    troubles = {0: KilledWriting("annotations"), 3: KilledWriting("checkpoint"), 6: KilledWriting("checkpoint", 3)}
    while kills < 10:  # repeat runs until there were ten kills
        status = -1
        while status:
            moment = KilledAfter(moments.uniform(0, 0.75 * seconds))
            status, log = run(fresh, resume(fresh), troubles.get(kills, moment) if kills < 10 else None)
            assert status in (0, -signal.SIGKILL), log
            kills += status != 0
        assert_same(read(newest(fresh)), read(whole))
        assert_same(read(newest(fresh, "best.ckpt"))["state_dict"], read(newest(home, "best.ckpt"))["state_dict"])
        (fresh / "runs").rename(fresh / f"done{kills}")


class InAStep:
    """Call `happening` in the middle of the n-th step."""

    def __init__(self, happening: Callable[[], None], name: str = "training_step", n: int = 3) -> None:
        self.happening, self.name, self.n = happening, name, n

    def __call__(self) -> None:
        from corrzoo.matcher import Matcher

        original, left = getattr(Matcher, self.name), self.n

        def step(*args: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                self.happening()
            return original(*args)

        setattr(Matcher, self.name, step)


def wait_for_a_signal() -> None:
    Path("steps").touch()
    time.sleep(1)


def fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # holds for root, too


def take_the_images_away() -> None:
    shutil.rmtree("data/SPair-71k/JPEGImages")


def kill_a_worker() -> None:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)  # as the kernel does when it is out of memory


@pytest.mark.parametrize(
    "happening, said",
    [
        (
            fill_the_disk,
            "error: cannot write the checkpoint .*last.ckpt \\(File too large; the previous checkpoint is",
        ),
        (take_the_images_away, "error: no image .*jpg: restore the file"),
        (kill_a_worker, "error: DataLoader worker .* (killed by signal|exited unexpectedly).*fewer --data.num_workers"),
    ],
)
def test_a_failure_during_training_is_one_line_and_the_run_resumes(
    home: Path, fresh: Path, happening: Callable[[], None], said: str
) -> None:
    images = ["--data.packed=false"]
    (fresh / "data").unlink()
    shutil.copytree(home / "data", fresh / "data")
    status, log = run(fresh, [*FIT, *images], InAStep(happening))
    assert status == 1 and re.fullmatch(said + ".*", log.splitlines()[-1]) and "Traceback" not in log, log
    assert read(newest(fresh))["global_step"] == 2
    shutil.copytree(home / "data", fresh / "data", dirs_exist_ok=True)
    assert run(fresh, resume(fresh))[0] == 0
    assert_same(read(newest(fresh)), read(newest(home)))


def protect(folder: Path) -> None:
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o555 if place.is_dir() else 0o444)


def release(folder: Path) -> None:
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755)


class Protected:
    """Make folders read-only in the middle of the third step."""

    def __init__(self, folders: str) -> None:
        self.folders = folders

    def __call__(self) -> None:
        obey_permissions()
        InAStep(lambda: [protect(folder) for folder in Path().glob(self.folders)])()


@pytest.mark.parametrize("command", ["fit", "test"])
def test_an_unwritable_folder_is_reported_at_the_start(fresh: Path, command: str) -> None:
    (fresh / "runs").mkdir(mode=0o555)
    status, log = run(fresh, [command, *FIT[1:], "--data.test=[spair71k]"], obey_permissions)
    assert status == 1 and "Traceback" not in log, log
    assert re.fullmatch("error: .*(Permission denied: .*runs/LPMFlow|cannot write .*runs).*", log.splitlines()[-1]), log


@pytest.mark.parametrize(
    "folders, said",
    [
        ("runs/*/*", "error: Permission denied: .*metrics.csv"),
        (
            "runs/*/*/checkpoints",
            "error: cannot write the checkpoint .*(best|last).ckpt \\(Permission denied; the previous checkpoint is.*",
        ),
    ],
)
def test_a_folder_that_becomes_unwritable_keeps_the_last_checkpoint(
    home: Path, fresh: Path, folders: str, said: str
) -> None:
    status, log = run(fresh, FIT, Protected(folders))
    assert status == 1 and re.fullmatch(said, log.splitlines()[-1]) and "Traceback" not in log, log
    assert read(newest(fresh))["global_step"] == 2
    release(fresh / "runs")
    assert run(fresh, resume(fresh), obey_permissions)[0] == 0
    assert_same(read(newest(fresh)), read(newest(home)))


def test_a_read_only_dataset_is_only_read(home: Path, fresh: Path) -> None:
    (fresh / "data").unlink()
    shutil.copytree(home / "data", fresh / "data")
    protect(fresh / "data")
    status, log = run(fresh, [*FIT, "--data.download=true"], obey_permissions)
    release(fresh / "data")
    assert status == 0, log
    assert_same(read(newest(fresh))["state_dict"], read(newest(home))["state_dict"])


def test_an_unwritable_cache_is_reported_skipped_or_read(home: Path, fresh: Path) -> None:
    (fresh / "cache").mkdir(mode=0o555)
    status, log = run(fresh, FIT, obey_permissions)
    said = "error: cannot keep .* of packed images in .*cache/images \\(Permission denied\\): .*--data.packed false"
    assert status == 1 and re.fullmatch(said, log.splitlines()[-1]) and "Traceback" not in log, log
    status, log = run(fresh, [*FIT, "--data.packed=false"], obey_permissions)
    assert status == 0 and f"cannot cache annotations in {fresh / 'cache'}" in log, log
    assert_same(read(newest(fresh))["state_dict"], read(newest(home))["state_dict"])
    release(fresh / "cache")
    assert run(fresh, FIT)[0] == 0  # another user fills it
    protect(fresh / "cache")
    status, log = run(fresh, FIT, obey_permissions)
    assert status == 0 and not re.search("cannot (keep|cache)|packing", log), log
    release(fresh / "cache")


@pytest.mark.parametrize(
    "name, step, to_all",
    [
        ("SIGTERM", 3, False),  # in the middle of an epoch
        ("SIGINT", 3, False),
        ("SIGTERM", 2, False),  # at the end of an epoch
        ("SIGTERM", 3, True),
        ("SIGINT", 3, True),
    ],
)
def test_a_signal_finishes_the_step_and_saves_a_checkpoint(
    home: Path, fresh: Path, name: str, step: int, to_all: bool
) -> None:
    status, log = run(fresh, FIT, InAStep(wait_for_a_signal, n=step), then=name, to_all=to_all)
    assert status == 128 + getattr(signal, name)
    assert log.splitlines()[-1] == f"interrupted ({name}) after step {step}; resume with --ckpt_path last"
    assert "Traceback" not in log and read(newest(fresh))["global_step"] == step
    assert run(fresh, resume(fresh))[0] == 0
    assert_same(read(newest(fresh)), read(newest(home)))
    assert_same(read(newest(fresh, "best.ckpt"))["state_dict"], read(newest(home, "best.ckpt"))["state_dict"])


def test_a_signal_ends_an_evaluation_at_once(home: Path, fresh: Path) -> None:
    test = ["test", *FIT[1:], "--data.test=[spair71k]", f"--ckpt_path={newest(home)}"]
    status, _ = run(fresh, test, InAStep(wait_for_a_signal, "test_step", 1), then="SIGTERM")
    assert status == -signal.SIGTERM


@pytest.mark.parametrize("name, reached", [("SIGUSR1", 4), ("SIGTERM", 3), ("SIGKILL", 2)])
def test_a_requeued_slurm_job_resumes(
    home: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str, reached: int
) -> None:
    """SLURM is imitated by its variables, its signals, and a `scontrol` that ends the job."""
    for variable, value in {"JOB_ID": "123", "JOB_NAME": "zoo", "NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0",
                            "NODELIST": "here", "LOCALID": "0", "NODEID": "0", "NNODES": "1"}.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{variable}", value)
    (fresh / "bin").mkdir()
    scontrol = fresh / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{fresh}/told"\nkill -TERM $PPID\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fresh / 'bin'}:{os.environ['PATH']}")
    config = Path(__file__).resolve().parents[2] / "zoo_configs" / "trainer" / "slurm.yaml"
    job = [*FIT, f"--config={config}", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    job += ["--trainer.precision=32-true", "--trainer.default_root_dir=job"]
    status, log = run(fresh, job, InAStep(wait_for_a_signal), then=name)
    assert status == (-signal.SIGKILL if name == "SIGKILL" else 128 + signal.SIGTERM), log
    assert read(newest(fresh, run="job"))["global_step"] == reached
    if name == "SIGUSR1":
        assert (fresh / "told").read_text() == "requeue 123\n"
        assert read(fresh / "job" / "hpc_ckpt_1.ckpt")["global_step"] == 3
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    status, log = run(fresh, job)  # the same command
    assert status == 0 and "Restored all states from the checkpoint at job/checkpoints/last.ckpt" in log, log
    assert_same(read(newest(fresh, run="job")), read(newest(home)))
    assert_same(read(newest(fresh, "best.ckpt", "job"))["state_dict"], read(newest(home, "best.ckpt"))["state_dict"])
