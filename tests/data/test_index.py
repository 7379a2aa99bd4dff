"""The annotation index: rebuilt after changes of the files and on request, refused when damaged, written whole."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import scipy.io
from fixtures import write_ap10k, write_caltech, write_cub, write_pfpascal, write_pfwillow, write_spair
from torch.utils.data import DataLoader

from corrzoo.data import create_dataset, index
from corrzoo.data.pairs import FolderDataset
from corrzoo.data.readers import spair
from corrzoo.files import cache_folder
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


def test_an_edit_in_place_is_noticed_on_request(tmp_path: Path, parses: list[str]) -> None:
    """The start looks at the folder's own time, not at 53,340 files."""
    write_spair(tmp_path)
    before = [repr(create_dataset("spair71k", tmp_path, "trn").record(i)) for i in range(4)]
    edit(annotation(tmp_path), "[10, 12]", "[11, 12]")
    unaware = create_dataset("spair71k", tmp_path, "trn")
    assert [repr(unaware.record(i)) for i in range(4)] == before and parses == ["trn"]
    refreshed = create_dataset("spair71k", tmp_path, "trn", refresh=True)
    assert refreshed.record(0).src_kps[0].tolist() == [11, 12]
    assert [repr(refreshed.record(i)) for i in range(1, 4)] == before[1:]
    assert create_dataset("spair71k", tmp_path, "trn").record(0).src_kps[0].tolist() == [11, 12]
    assert parses == ["trn", "trn"]


def test_a_file_that_is_replaced_is_noticed(tmp_path: Path, parses: list[str]) -> None:
    """As most editors and archivers write: a new file takes the name. Its size and times are those of the old one."""
    write_spair(tmp_path)
    create_dataset("spair71k", tmp_path, "trn")
    path = annotation(tmp_path)
    state, new = path.stat(), path.with_suffix(".new")
    new.write_text(path.read_text().replace("[10, 12]", "[11, 12]"))
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    new.replace(path)
    assert create_dataset("spair71k", tmp_path, "trn").record(0).src_kps[0].tolist() == [11, 12]
    assert parses == ["trn", "trn"]


def test_an_invalid_edit_is_named_after_a_refresh(tmp_path: Path) -> None:
    write_spair(tmp_path)
    create_dataset("spair71k", tmp_path, "trn")
    edit(path := annotation(tmp_path), "[10, 12]", "[10, 99]")
    with pytest.raises(ZooError, match=r"source point \[10.0, 99.0\] is not in its 64x48 image") as error:
        create_dataset("spair71k", tmp_path, "trn", refresh=True)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_records_do_not_need_the_annotation_files(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset, other = (create_dataset("spair71k", tmp_path, "trn", size=(48, 64)) for _ in range(2))
    for path in (tmp_path / "SPair-71k" / "PairAnnotation" / "trn").iterdir():
        path.unlink()
    (batch,) = DataLoader(other, 4, collate_fn=other.collate, num_workers=1)
    assert [float(x) for x in batch.src_kps[0, 0]] == dataset[0].src_kps[0].tolist() == [10, 12]


@pytest.mark.parametrize(
    "name, file", [("pfwillow", "duck(S)/a_001.mat"), ("pfpascal", "Annotations/car/2008_000010.mat")]
)
def test_other_annotations_are_all_checked_at_the_start(tmp_path: Path, name: str, file: str) -> None:
    if name == "pfwillow":
        write_pfwillow(tmp_path, lists=False)
    else:
        write_pfpascal(tmp_path)
    create_dataset(name, tmp_path, "test")
    (path,) = tmp_path.glob(f"*/{file}")
    path.write_bytes(b"no longer a matrix")
    with pytest.raises(ZooError, match=path.name.replace("(", "[(]")):
        create_dataset(name, tmp_path, "test")


def test_a_mat_file_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    points = write_pfwillow(tmp_path, lists=False)["duck(S)/a_001"]
    create_dataset("pfwillow", tmp_path, "test")
    (path,) = tmp_path.glob("*/duck(S)/a_001.mat")
    state = path.stat()
    scipy.io.savemat(path, {"pts_coord": points + 1})
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    dataset = create_dataset("pfwillow", tmp_path, "test")
    (record,) = [r for r in map(dataset.record, range(len(dataset))) if r.src_path == path.with_suffix(".png")]
    assert np.array_equal(record.src_kps.T, points + 1)


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
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path: Path, parses: list[str], damage: str) -> None:
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


def test_a_root_has_one_cache_however_it_is_written(
    tmp_path: Path, parses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spair(tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    for root in (Path("data"), tmp_path / "data", Path("link"), Path("data")):
        dataset = create_dataset("spair71k", root, "trn")
        assert dataset.record(0).src_path.is_relative_to(root)
    assert parses == ["trn"]
    edit(tmp_path / "data" / "SPair-71k" / "Layout" / "large" / "trn.txt", "\n", "\n\n")
    create_dataset("spair71k", "data", "trn")
    edit(annotation(tmp_path / "data"), "[10, 12]", "[11, 12]")
    create_dataset("spair71k", "link", "trn")  # an edited pair is noticed on request only, whichever way
    assert parses == ["trn", "trn"]


READER = """
from corrzoo.data.pairs import FolderDataset
from corrzoo.types import Record
import torch

class Reader(FolderDataset):
    name, folder, holds, splits, categories = "plugin", "", "a list", ("test",), ["cat", "dog"]

    def sources(self):
        return [self.home / "list.txt"]

    def read(self):
        kps = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        image = self.home / "list.txt"
        yield "list.txt", Record(image, image, kps, kps, (40, 40), (40, 40), "cat")
"""


def test_an_edit_of_a_plugin_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first() -> tuple[list, str]:
        sys.modules.pop("plugin_reader", None)
        importlib.invalidate_caches()
        record = importlib.import_module("plugin_reader").Reader(tmp_path, "test").record(0)
        return record.src_kps.tolist(), record.category

    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "list.txt").touch()
    code = tmp_path / "code" / "plugin_reader.py"
    code.parent.mkdir()
    code.write_text(READER)
    assert first() == ([[1, 2]], "cat")
    code.write_text(READER.replace("[[1.0, 2.0]]", "[[1.5, 2.0]]"))
    assert first() == ([[1.5, 2]], "cat")
    monkeypatch.delitem(sys.modules, "plugin_reader")


def test_a_class_without_a_file_is_parsed_at_every_start(tmp_path: Path) -> None:
    (tmp_path / "list.txt").touch()
    cell: dict = {"__name__": "cell"}  # as in a notebook
    for x in (1.0, 1.5):
        exec(READER.replace("[[1.0, 2.0]]", f"[[{x}, 2.0]]"), cell)
        assert cell["Reader"](tmp_path, "test").record(0).src_kps.tolist() == [[x, 2]]


def test_other_categories_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spair(tmp_path)
    before = create_dataset("spair71k", tmp_path, "trn").record(0).category
    monkeypatch.setattr(spair.SPair71k, "categories", ["new", *spair.SPair71k.categories])
    assert create_dataset("spair71k", tmp_path, "trn").record(0).category == before


def test_records_do_not_share_the_packed_arrays(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = create_dataset("spair71k", tmp_path, "trn")
    dataset.record(0).src_kps.fill_(0)
    dataset.record(0).src_box.fill_(0)
    assert dataset.record(0).src_kps.tolist() == [[10, 12], [30, 20], [50, 40]]
    assert dataset.record(0).src_box.tolist() == [1, 1, 64, 47]
