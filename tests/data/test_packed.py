"""Packed images: equal to decoded ones, written once by one of many processes, rebuilt when stale, never incomplete."""

import errno
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures import draw, write_cub, write_pfpascal, write_spair

from corrzoo.data import PairDataset, create_dataset, packed
from corrzoo.data.augment import create_augment
from corrzoo.types import ZooError

fork = multiprocessing.get_context("fork")


def spair(root: Path, size: int | tuple[int, int] = (24, 32), split: str = "trn", **options) -> PairDataset:
    return create_dataset("spair71k", root, split, size=size, **options)


def counting(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """Every image that any process decodes leaves a byte in the log."""
    decode = PairDataset._decode

    def logged(self: PairDataset, number: int) -> torch.Tensor:
        with open(log, "ab") as file:
            file.write(b".")
        return decode(self, number)

    monkeypatch.setattr(PairDataset, "_decode", logged)
    log.touch()


def same(one: PairDataset, other: PairDataset) -> bool:
    return all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        for i in range(len(one))
        for a, b in zip(one[i], other[i], strict=True)
    )


@pytest.mark.parametrize("augment", ["none", "cats"])
def test_samples_are_the_same_to_the_bit(tmp_path: Path, augment: str) -> None:
    write_spair(tmp_path)
    write_pfpascal(tmp_path)  # whose training list mirrors
    write_cub(tmp_path)
    for name, options in (("spair71k", {}), ("pfpascal", {}), ("cub", {"length": 9})):
        options |= {"size": (24, 32), "augment": create_augment(augment)}
        plain, other = (create_dataset(name, tmp_path, "trn", **options) for _ in range(2))
        other.pack(tmp_path / "packed")
        assert same(plain, other)


def test_writing_into_a_sample_does_not_change_the_file(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = spair(tmp_path)
    dataset.pack(tmp_path / "packed")
    before = dataset[0].src_img.clone()
    dataset[0].src_img.zero_()
    assert torch.equal(dataset[0].src_img, before)


def test_images_are_decoded_once_and_again_when_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spair(tmp_path)
    counting(monkeypatch, log := tmp_path / "log")
    for decoded in (5, 5):
        spair(tmp_path).pack(tmp_path / "packed")
        assert log.stat().st_size == decoded
    changed = tmp_path / "SPair-71k/JPEGImages/cat/2009_000004.jpg"
    draw(changed, (50, 50))
    os.utime(changed, ns=(0, 0))
    again, (old,) = spair(tmp_path), (tmp_path / "packed").glob("*.u8")
    again.pack(tmp_path / "packed")
    (new,) = (tmp_path / "packed").glob("*.u8")
    assert log.stat().st_size == 10 and new != old
    spair(tmp_path, size=16).pack(tmp_path / "packed")  # another size has a file of its own
    assert log.stat().st_size == 15 and new.exists() and same(again, spair(tmp_path))


def test_two_projects_with_the_same_relative_root_keep_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(monkeypatch, log := tmp_path / "log")
    for project in ("a", "b"):
        write_spair(tmp_path / project / "data")
    for project, decoded in (("a", 5), ("b", 10), ("a", 10), ("b", 10)):
        monkeypatch.chdir(tmp_path / project)
        for root in (Path("data"), tmp_path / project / "data"):  # both ways to write it mean the same file
            spair(root).pack(tmp_path / "packed")
            assert log.stat().st_size == decoded


@pytest.mark.parametrize("replace", [True, False])
def test_an_image_of_the_same_size_and_time_is_noticed(tmp_path: Path, replace: bool) -> None:
    """As after `cp --preserve` or `rsync --times` from another copy of the dataset."""
    write_spair(tmp_path)
    image = tmp_path / "SPair-71k/JPEGImages/cat/2009_000004.jpg"
    state, content = image.stat(), image.read_bytes()
    dataset = spair(tmp_path)
    dataset.pack(tmp_path / "packed")
    before = dataset._packed[dataset.images.index(image)]
    target = image.with_name("new.jpg") if replace else image
    draw(target, (50, 50), [[20, 20]])
    target.write_bytes(target.read_bytes().ljust(len(content), b"\0"))  # a decoder stops at the end-of-image marker
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
    target.replace(image)
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    again = spair(tmp_path)
    again.pack(tmp_path / "packed")
    assert same(again, spair(tmp_path)) and not torch.equal(again._packed[again.images.index(image)], before)


def test_packing_leaves_another_splits_unfinished_file_alone(tmp_path: Path) -> None:
    write_spair(tmp_path)
    spair(tmp_path).pack(tmp_path / "packed")
    (done,) = (tmp_path / "packed").glob("*.u8")
    unfinished = done.with_name(f".{done.name.replace('-trn-', '-val-')}.x1.u8")
    unfinished.touch()
    spair(tmp_path, split="test").pack(tmp_path / "packed")
    assert unfinished.exists()


def test_many_processes_make_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spair(tmp_path)
    counting(monkeypatch, log := tmp_path / "log")
    expected = spair(tmp_path)[1].trg_img
    log.write_bytes(b"")

    def work(answers: "multiprocessing.SimpleQueue[bool]") -> None:
        dataset = spair(tmp_path)
        dataset.pack(tmp_path / "packed")
        answers.put(torch.equal(dataset[1].trg_img, expected))

    answers = fork.SimpleQueue()
    workers = [fork.Process(target=work, args=(answers,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [answers.get() for _ in workers] == [True] * 4 and log.stat().st_size == 5


def test_a_killed_process_leaves_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spair(tmp_path)
    monkeypatch.setattr(packed, "READERS", 1)

    def work() -> None:
        dataset = spair(tmp_path)
        decode = dataset._decode
        dataset._decode = lambda number: decode(number) if number < 3 else os.kill(os.getpid(), signal.SIGKILL)
        dataset.pack(tmp_path / "packed")

    worker = fork.Process(target=work)
    worker.start()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL and not list((tmp_path / "packed").glob("[!.]*.u8"))
    assert len(list((tmp_path / "packed").glob(".*"))) == 1
    dataset = spair(tmp_path)
    dataset.pack(tmp_path / "packed")
    assert same(dataset, spair(tmp_path)) and not list((tmp_path / "packed").glob(".*"))


def test_images_that_wait_for_the_disk_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is faster than writing: no more than `AHEAD` images are in memory, and their order is kept."""
    monkeypatch.setattr(packed, "AHEAD", 4)
    decoded: list[int] = []
    most = 0

    class Pixels:
        def __init__(self, number: int) -> None:
            self.number = number
            decoded.append(number)

        def numpy(self) -> SimpleNamespace:
            nonlocal most
            time.sleep(0.01)
            most = max(most, len(decoded) - self.number)
            return SimpleNamespace(data=bytes([self.number]))

    packed._write(tmp_path / "packed", 10, Pixels)
    assert (tmp_path / "packed").read_bytes() == bytes(range(10)) and 1 <= most <= 4


def test_a_file_of_another_length_is_written_again(tmp_path: Path) -> None:
    write_spair(tmp_path)
    spair(tmp_path).pack(tmp_path / "packed")
    (path,) = (tmp_path / "packed").glob("*.u8")
    path.write_bytes(path.read_bytes()[:100])
    dataset = spair(tmp_path)
    dataset.pack(tmp_path / "packed")
    assert same(dataset, spair(tmp_path))


def test_disk_use_is_bounded_and_the_oldest_files_are_removed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spair(tmp_path)
    monkeypatch.setattr(packed, "LIMIT", 5 * 3 * (16 * 16 + 20 * 20))
    for second, size in enumerate((16, 20, 18)):
        spair(tmp_path, size=size).pack(tmp_path / "packed")
        for path in (tmp_path / "packed").glob(f"*-{size}x{size}-*"):
            os.utime(path, (second, second))
    assert sorted(path.stat().st_size for path in (tmp_path / "packed").glob("*.u8")) == [5 * 3 * 18 * 18]


def test_files_that_other_processes_remove_meanwhile_do_not_count(tmp_path: Path) -> None:
    write_spair(tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "removed.u8").symlink_to(tmp_path / "removed")  # listed, but without a state
    spair(tmp_path).pack(tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*24x32*.u8"))) == 1


def test_a_folder_that_cannot_be_written_or_is_full_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spair(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"file/packed \(Not a directory\): name another folder with --data.packed"):
        spair(tmp_path).pack(tmp_path / "file" / "packed")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ZooError, match=r"No space left on device\): .* --data.packed false"):
        spair(tmp_path).pack(tmp_path / "packed")
    assert [path.suffix for path in (tmp_path / "packed").iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(ZooError, match="0 MB are free or allowed"):
        spair(tmp_path).pack(tmp_path / "packed")


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = spair(tmp_path)
    image = tmp_path / "SPair-71k/JPEGImages/cat/2009_000004.jpg"
    image.write_bytes(image.read_bytes()[:400])
    with pytest.raises(ZooError, match=r"2009_000004\.jpg .*fetch it again"):
        dataset.pack(tmp_path / "packed")
    image.unlink()
    with pytest.raises(ZooError, match=r"no file .*2009_000004\.jpg"):
        dataset.pack(tmp_path / "packed")
    with pytest.raises(ZooError, match="renders its images"):
        create_dataset("synthetic", tmp_path, "val").pack(tmp_path)


def test_workers_are_not_sent_the_pixels(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = spair(tmp_path, size=256)
    dataset.pack(tmp_path / "packed")
    sent = pickle.dumps(dataset._packed)
    assert len(sent) < 1000 and torch.equal(pickle.loads(sent)[2], dataset._packed[2])
