"""The annotation cache: right after any change of the files, never trusted when damaged, never half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from fixtures import write_ap10k, write_caltech, write_cub, write_pfpascal, write_pfwillow, write_spair
from torch.utils.data import DataLoader

from corrzoo.data import create_dataset, index
from corrzoo.data.index import cache_folder
from corrzoo.data.pairs import FolderDataset
from corrzoo.data.readers import spair
from corrzoo.types import ZooError


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows whenever annotations are parsed."""
    calls: list[str] = []
    original = spair.SPair71k.read

    def read(self: FolderDataset) -> object:
        calls.append(self.split)
        return original(self)

    monkeypatch.setattr(spair.SPair71k, "read", read)
    return calls


def annotation(root: Path) -> Path:
    return sorted((root / "SPair-71k" / "PairAnnotation" / "trn").iterdir())[0]


def test_parsed_once_and_the_same_from_the_cache(tmp_path: Path, parses: list[str]) -> None:
    write_spair(tmp_path)
    first, second = (create_dataset("spair71k", tmp_path, "trn") for _ in range(2))
    assert parses == ["trn"]
    for i in range(4):
        assert repr(first.record(i)) == repr(second.record(i))
    create_dataset("spair71k", tmp_path, "val")
    create_dataset("spair71k", tmp_path, "trn", layout="small")
    create_dataset("spair71k", tmp_path, "trn")
    assert parses == ["trn", "val", "trn"]


@pytest.mark.parametrize(
    "write, name, options",
    [
        (write_pfpascal, "pfpascal", {}),
        (write_pfwillow, "pfwillow", {}),
        (write_caltech, "caltech101", {}),
        (write_ap10k, "ap10k", {}),
        (write_cub, "cub", {"length": 20}),
    ],
)
def test_every_reader_survives_its_cache(tmp_path: Path, write: Callable, name: str, options: dict) -> None:
    write(tmp_path)
    first, second = (create_dataset(name, tmp_path, "test", **options) for _ in range(2))
    assert [repr(first.record(i)) for i in range(len(first))] == [repr(second.record(i)) for i in range(len(second))]


def edit(path: Path, old: str, new: str) -> None:
    """Change a file where it lies, within the clock's resolution."""
    before = path.stat()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_an_annotation_edited_in_place_is_never_served_stale(tmp_path: Path, parses: list[str]) -> None:
    write_spair(tmp_path)
    running, other = (create_dataset("spair71k", tmp_path, "trn", size=(48, 64)) for _ in range(2))
    before = [repr(running.record(i)) for i in range(4)]
    edit(annotation(tmp_path), "[10, 12]", "[11, 12]")  # the same size
    started = create_dataset("spair71k", tmp_path, "trn", size=(48, 64))
    assert parses == ["trn"]  # at the start nobody looked at 53,340 files
    for dataset in (started, running):
        assert dataset.record(0).src_kps[0].tolist() == dataset[0].src_kps[0].tolist() == [11, 12]
        assert [repr(dataset.record(i)) for i in range(1, 4)] == before[1:]
    (sample, *_) = DataLoader(other, 4, collate_fn=other.collate, num_workers=1)
    assert sample.src_kps[0, 0].tolist() == [11, 12]
    assert create_dataset("spair71k", tmp_path, "trn").record(0).src_kps[0].tolist() == [11, 12]
    create_dataset("spair71k", tmp_path, "trn")
    assert parses == ["trn", "trn"]  # once more, by the first start after the change was seen


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[10, 12]", "[10, 99]", r"source point \[10.0, 99.0\] is not in its 64x48 image"),
        ('"src_kps"', '"sources"', "not an annotation of SPair-71k"),
        ("2008_000001.jpg", "2008_000003.jpg", r"its src_path is .*2008_000003\.jpg now: start again"),
        ("[64, 48, 3]", "[65, 48, 3]", r"its src_size is \(65, 48\) now: start again"),
    ],
)
def test_an_edit_that_cannot_be_followed_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_spair(tmp_path)
    dataset, path = create_dataset("spair71k", tmp_path, "trn"), annotation(tmp_path)
    edit(path, old, new)
    with pytest.raises(ZooError, match=message) as error:
        dataset.record(0)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_after_other_images_one_starts_again(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset, path = create_dataset("spair71k", tmp_path, "trn"), annotation(tmp_path)
    pair = json.loads(path.read_text())
    pair |= {f"src_{what}": pair[f"trg_{what}"] for what in ("imname", "imsize", "kps", "bndbox")}
    path.write_text(json.dumps(pair))
    with pytest.raises(ZooError, match="start again"):
        dataset[0]
    assert create_dataset("spair71k", tmp_path, "trn").record(0).src_path.name == pair["trg_imname"]


def test_an_index_that_cannot_be_removed_is_named_and_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spair(tmp_path)
    create_dataset("spair71k", tmp_path, "trn")
    edit(annotation(tmp_path), "[10, 12]", "[11, 12]")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        with pytest.warns(UserWarning, match="cannot remove the stale .*not yours.*CORRZOO_CACHE"):
            assert create_dataset("spair71k", tmp_path, "trn").record(0).src_kps[0].tolist() == [11, 12]


def test_a_file_that_went_while_it_was_needed_is_named(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset, path = create_dataset("spair71k", tmp_path, "trn"), annotation(tmp_path)
    path.unlink()
    with pytest.raises(ZooError, match=rf"no annotation .*{path.name} \(No such file.*\): restore it"):
        dataset[0]


def test_an_edit_while_all_are_parsed_counts_as_one_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spair(tmp_path)
    path, read_pair = annotation(tmp_path), spair.SPair71k.read_pair

    def interrupted(self: FolderDataset, file: Path) -> object:
        record = read_pair(self, file)
        if file == path:
            monkeypatch.undo()
            edit(path, "[10, 12]", "[11, 12]")
        return record

    monkeypatch.setattr(spair.SPair71k, "read_pair", interrupted)
    assert create_dataset("spair71k", tmp_path, "trn").record(0).src_kps[0].tolist() == [11, 12]


@pytest.mark.parametrize(
    "name, file", [("pfwillow", "duck(S)/a_001.mat"), ("pfpascal", "Annotations/car/2008_000010.mat")]
)
def test_readers_of_other_files_look_at_all_of_them_at_the_start(tmp_path: Path, name: str, file: str) -> None:
    if name == "pfwillow":
        write_pfwillow(tmp_path, lists=False)
    else:
        write_pfpascal(tmp_path)
    create_dataset(name, tmp_path, "test")
    (path,) = tmp_path.glob(f"*/{file}")
    path.write_bytes(b"no longer a matrix")
    with pytest.raises(ZooError, match=path.name.replace("(", "[(]")):
        create_dataset(name, tmp_path, "test")


def test_an_added_and_a_removed_file_are_noticed(tmp_path: Path, parses: list[str]) -> None:
    pair = write_spair(tmp_path)["trn"][0]
    create_dataset("spair71k", tmp_path, "trn")
    listing = tmp_path / "SPair-71k" / "Layout" / "large" / "trn.txt"
    old, name = listing.read_text(), pair["filename"].replace("000001", "000099")
    added = annotation(tmp_path).with_name(f"{name}.json")
    added.write_text(json.dumps(pair))
    listing.write_text(f"{old}{name}\n")
    assert len(create_dataset("spair71k", tmp_path, "trn")) == 5
    added.unlink()
    listing.write_text(old)
    assert len(create_dataset("spair71k", tmp_path, "trn")) == 4
    assert len(parses) == 3


@pytest.mark.parametrize("damage", ["empty", "garbage", "half", "flipped", "method", "array", "foreign"])
def test_a_damaged_cache_is_made_anew_with_a_warning(tmp_path: Path, parses: list[str], damage: str) -> None:
    write_spair(tmp_path)
    create_dataset("spair71k", tmp_path, "trn")
    (path,) = cache_folder().iterdir()
    good = path.read_bytes()
    at = good.index(np.float64(30).tobytes())  # a coordinate
    path.write_bytes(
        {
            "empty": b"",
            "garbage": b"not an archive" * 9,
            "half": good[: len(good) // 2],
            "flipped": good[:at] + b"\xff" + good[at + 1 :],
            "method": good.replace(b"PK\x01\x02", b"PK\x01\x02\xff", 1),  # shifts how the first array is compressed
            "array": b"",
            "foreign": good,
        }[damage]
    )
    if damage == "foreign":
        with open(path, "wb") as file:
            np.savez(file, state=np.array(["?"], dtype=object))  # a pickle inside
    if damage == "array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    with pytest.warns(UserWarning, match="damaged"):
        dataset = create_dataset("spair71k", tmp_path, "trn")
    assert dataset.record(0).src_kps.tolist() == [[10, 12], [30, 20], [50, 40]]
    create_dataset("spair71k", tmp_path, "trn")
    assert len(parses) == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spair(tmp_path)

    def savez(file: IO[bytes], **_: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(index.np, "savez", savez)
    with pytest.warns(UserWarning, match="disk full.*CORRZOO_CACHE"):
        assert len(create_dataset("spair71k", tmp_path, "trn")) == 4
    assert list(cache_folder().iterdir()) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRZOO_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("CORRZOO_CACHE")
    assert cache_folder() == Path("/b/corrzoo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "corrzoo"


def test_two_roots_have_two_caches(tmp_path: Path) -> None:
    write_spair(tmp_path / "a")
    write_spair(tmp_path / "b")
    (tmp_path / "b" / "SPair-71k" / "Layout" / "large" / "trn.txt").write_text(f"{annotation(tmp_path / 'b').stem}\n")
    for root, n in (("a", 4), ("b", 1), ("a", 4)):
        assert len(create_dataset("spair71k", tmp_path / root, "trn")) == n
    assert len(list(cache_folder().iterdir())) == 2


def test_records_do_not_share_the_packed_arrays(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = create_dataset("spair71k", tmp_path, "trn")
    dataset.record(0).src_kps.fill_(0)
    dataset.record(0).src_box.fill_(0)
    assert dataset.record(0).src_kps.tolist() == [[10, 12], [30, 20], [50, 40]]
    assert dataset.record(0).src_box.tolist() == [1, 1, 64, 47]
