"""Damaged annotations and images: read as an independent reader reads them, or refused by name, in bounded time.

Hypothesis changes valid files. A reader then either raises one line that names a file of the dataset, or returns the
keypoints that an independent reading of the same file finds. Derandomised: the same examples every time.
"""

import csv
import io
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from fixtures import (
    AP10K_ANIMALS,
    CUB_FILES,
    cub_pairs,
    read_cub,
    write_ap10k,
    write_caltech,
    write_cub,
    write_pfpascal,
    write_pfwillow,
    write_spair,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from corrzoo.data import create_dataset
from corrzoo.images import image_size, read_rgb, to_tensor
from corrzoo.types import Record, ZooError


def fuzz(examples: int) -> Callable:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=timedelta(seconds=20),  # of one example; most take 20 ms, and the machine may be shared
        database=None,
        suppress_health_check=checks,
    )


NASTY = st.sampled_from(
    [None, True, 0, -1, 2**70, 10**400, float("nan"), float("inf"), 1e308, "12", "nan", "1e400", "0x10", " 7 ", [], {}]
)
NAMES = st.sampled_from(
    [
        "",
        ".",
        "..",
        "../..",
        "/etc/passwd",
        "../cat/2009_000004.jpg",
        "../../../../x",
        "a\0b",
        "x" * 300,
        "2008_000002.jpg",
    ]
)
SCALARS = st.one_of(NASTY, NAMES, st.integers(-3, 70), st.floats(-3, 70), st.floats(), st.text(max_size=5))
VALUES = SCALARS | st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)  # fmt: skip
BYTES = st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8))
"""Where in a file, how many bytes go, and what comes in their place."""


def damaged(data: bytes, change: tuple[float, int, bytes]) -> bytes:
    where, gone, new = int(change[0] * len(data)), change[1], change[2]
    return data[:where] + new + data[where + gone :]


def records(name: str, root: Path, split: str, **options: Any) -> list | None:
    """The reader's records; None if it refuses in one line that names a file."""
    try:
        dataset = create_dataset(name, root, split, refresh=True, **options)
        return [dataset.record(i) for i in range(len(dataset))]
    except ZooError as error:
        assert str(root) in str(error) and "\n" not in str(error)
        return None


@pytest.fixture
def spair(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """The dataset's root, its second training pair, and what that file holds."""
    write_spair(tmp_path)
    (path,) = (tmp_path / "SPair-71k" / "PairAnnotation" / "trn").glob("000002*.json")
    return tmp_path, path, path.read_bytes()


READ = [f"{side}_{what}" for side in ("src", "trg") for what in ("imname", "imsize", "kps", "bndbox")]
READ += ["category", "viewpoint_variation", "truncation"]


def check_spair(root: Path, path: Path) -> None:
    if found := records("spair71k", root, "trn"):
        check_record(root, json.loads(path.read_bytes()), found[1])


def check_record(root: Path, pair: dict[str, Any], record: Record) -> None:
    for side in ("src", "trg"):
        expected = [[float(x), float(y)] for x, y in pair[f"{side}_kps"]]
        kps, (w, h) = getattr(record, f"{side}_kps").tolist(), getattr(record, f"{side}_size")
        assert kps == expected and kps
        assert all(-1 <= x <= w + 1 and -1 <= y <= h + 1 for x, y in kps)
        assert [float(s) for s in pair[f"{side}_imsize"][:2]] == [w, h]
        assert getattr(record, f"{side}_box").tolist() == [float(v) for v in pair[f"{side}_bndbox"]]
        assert getattr(record, f"{side}_path").name == pair[f"{side}_imname"]
        path = getattr(record, f"{side}_path")
        assert path.is_file() and path.resolve().is_relative_to(root)
        assert all(0 <= flag <= 3 for flag in record.flags.values())
    assert len(record.src_kps) == len(record.trg_kps) and record.category == pair["category"]


@fuzz(250)
@given(data=st.data())
def test_values_of_an_annotation(spair: tuple[Path, Path, bytes], data: Any) -> None:
    root, path, original = spair
    pair = json.loads(original)
    place: Any = pair
    key: Any = data.draw(st.sampled_from(READ))
    while isinstance(place[key], list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.integers(0, len(place) - 1))
    if data.draw(st.integers(0, 5)):
        place[key] = data.draw(VALUES)
    else:
        del place[key]
    path.write_text(json.dumps(pair))  # as Python does, with NaN and Infinity
    check_spair(root, path)


@fuzz(120)
@given(change=BYTES)
def test_bytes_of_an_annotation(spair: tuple[Path, Path, bytes], change: tuple[float, int, bytes]) -> None:
    root, path, original = spair
    path.write_bytes(damaged(original, change))
    check_spair(root, path)


WRITERS = {"pfwillow": write_pfwillow, "pfpascal": write_pfpascal, "caltech101": write_caltech}


@pytest.fixture(params=WRITERS)
def listed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path, bytes]:
    """A dataset with a list: its name and root, the list, and what it holds."""
    options = {"mats": False} if request.param == "pfpascal" else {}
    WRITERS[request.param](tmp_path, **options)
    (path,) = tmp_path.glob("*/test_pairs*.csv")
    return request.param, tmp_path, path, path.read_bytes()


CELLS = st.one_of(
    SCALARS.map(str), st.sampled_from(["", "1;2", "1;x", "1,2", "nan", '"', "1e999", "\ufeff1", "٣", "1_0", "a/b.jpg"])
)


def numbers(cell: str) -> list[float]:
    return [float(v) for v in cell.replace(",", ";").split(";")]


@fuzz(80)
@given(row=st.integers(0, 3), column=st.integers(0, 45), cell=CELLS, end=st.sampled_from(["\n", "\r\n"]))
def test_cells_of_a_list(listed: tuple[str, Path, Path, bytes], row: int, column: int, cell: str, end: str) -> None:
    name, root, path, original = listed
    rows = list(csv.reader(io.StringIO(original.decode())))
    row %= len(rows)
    if column < len(rows[row]):
        rows[row][column] = cell
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    path.write_text("\ufeff" + text.getvalue(), "utf-8", newline="")
    found = records(name, root, "test")
    if found is None:
        return
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))[1:]
    for cells, record in zip((r for r in rows if r), found, strict=True):
        if name == "pfwillow":
            x, y, u, v = (cells[k : k + 10] for k in (2, 12, 22, 32))
            expected = [[*map(float, p)] for p in zip(x, y, u, v, strict=True)]
        else:
            expected = [list(p) for p in zip(*(numbers(c) for c in cells[3:7]), strict=False)]
        src = record.src_kps if record.src_polygon is None else record.src_polygon
        trg = record.trg_kps if record.trg_polygon is None else record.trg_polygon
        assert [[*a, *b] for a, b in zip(src.tolist(), trg.tolist(), strict=False)] == expected
        assert record.src_path.is_file() and record.src_path.is_relative_to(root)


@fuzz(60)
@given(change=BYTES)
def test_bytes_of_a_list(listed: tuple[str, Path, Path, bytes], change: tuple[float, int, bytes]) -> None:
    name, root, path, original = listed
    path.write_bytes(damaged(original, change))
    records(name, root, "test")


@fuzz(60)
@given(change=BYTES, value=VALUES | st.sampled_from([1 + 2j, [[1j, 2]], [["a", "b"]]]), whole=st.booleans())
def test_matlab_annotations(
    tmp_path_factory: pytest.TempPathFactory, change: tuple[float, int, bytes], value: object, whole: bool
) -> None:
    root = tmp_path_factory.mktemp("willow")
    write_pfwillow(root, lists=False)
    path = root / "PF-WILLOW" / "duck(S)" / "a_001.mat"
    if whole:
        path.write_bytes(damaged(path.read_bytes(), change))
    else:
        try:
            scipy.io.savemat(path, {"pts_coord": np.array(value)})
        except Exception:  # not everything can be written
            return
    if (found := records("pfwillow", root, "test")) is not None:
        expected = scipy.io.loadmat(path, variable_names=["pts_coord"])["pts_coord"].T
        kept = [r.src_kps.numpy() for r in found if r.src_path == path.with_suffix(".png")]
        assert all(np.array_equal(kps, expected) for kps in kept) and kept


@pytest.fixture
def cub(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A copy of CUB-200-2011, and the content of its files."""
    home = write_cub(tmp_path, species=[1, 2, 21], images=4)
    return home, {name: (home / name).read_bytes() for name in CUB_FILES}


def check_cub(home: Path, whole: dict[str, bytes], name: str, content: bytes) -> None:
    for file, original in whole.items():
        (home / file).write_bytes(content if file == name else original)
    if (found := records("cub", home.parent, "val", length=5)) is None:
        return
    images = read_cub(home)
    for record, pair in zip(found, cub_pairs(images, "val", 5), strict=True):
        for side, number in zip(("src", "trg"), pair, strict=True):
            parts, path = images[number]["parts"], home / "images" / images[number]["name"]
            assert (
                getattr(record, f"{side}_path") == path
                and getattr(record, f"{side}_box").tolist() == images[number]["box"]
            )
            assert getattr(record, f"{side}_kps").tolist() == [parts[k] for k in record.kps_ids.tolist()]


@fuzz(200)
@given(name=st.sampled_from(CUB_FILES), row=st.integers(0, 200), column=st.integers(0, 4), cell=CELLS | NAMES)
def test_cells_of_cub(cub: tuple[Path, dict[str, bytes]], name: str, row: int, column: int, cell: str) -> None:
    home, whole = cub
    rows = [line.split(" ") for line in whole[name].decode().splitlines()]
    cells = rows[row % len(rows)]
    cells[column % len(cells)] = cell
    check_cub(home, whole, name, "\n".join(map(" ".join, rows)).encode())


@fuzz(200)
@given(name=st.sampled_from(CUB_FILES), change=BYTES)
def test_bytes_of_cub(cub: tuple[Path, dict[str, bytes]], name: str, change: tuple[float, int, bytes]) -> None:
    home, whole = cub
    check_cub(home, whole, name, damaged(whole[name], change))


@pytest.fixture
def animals(tmp_path: Path) -> tuple[Path, list[tuple[Path, bytes]]]:
    """AP-10K's root, and the files of its test pair: the pair, and the annotation of its source image."""
    write_ap10k(tmp_path)
    (pair,) = (tmp_path / "ap-10k/PairAnnotation/test").iterdir()
    image = tmp_path / "ap-10k/ImageAnnotation" / f"{next(iter(AP10K_ANIMALS))}.json"
    return tmp_path, [(path, path.read_bytes()) for path in (pair, image)]


@fuzz(120)
@given(change=BYTES, which=st.integers(0, 1))
def test_bytes_of_ap10k(
    animals: tuple[Path, list[tuple[Path, bytes]]], change: tuple[float, int, bytes], which: int
) -> None:
    root, files = animals
    for path, original in files:
        path.write_bytes(original)
    path, original = files[which]
    path.write_bytes(damaged(original, change))
    for record in records("ap10k", root, "test") or []:
        for side in ("src", "trg"):
            image = getattr(record, f"{side}_path").relative_to(root / "ap-10k/JPEGImages")
            note = json.loads((root / "ap-10k/ImageAnnotation" / image.with_suffix(".json")).read_bytes())
            points = np.array(note["keypoints"], dtype=float).reshape(17, 3)[:, :2].tolist()
            assert all(point in points for point in getattr(record, f"{side}_kps").tolist())
            x, y, w, h = map(float, note["bbox"])
            assert getattr(record, f"{side}_box").tolist() == [x, y, x + w, y + h]


@fuzz(150)
@given(change=BYTES, suffix=st.sampled_from([".jpg", ".png"]), cut=st.booleans())
def test_bytes_of_an_image(tmp_path: Path, change: tuple[float, int, bytes], suffix: str, cut: bool) -> None:
    path = tmp_path / f"image{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(change[0] * len(data))] if cut else damaged(data, change))
    try:
        size = image_size(path)
        tensor = to_tensor(read_rgb(path, (30, 20)), (8, 9))
    except ZooError as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        assert size == (30, 20) and tensor.shape == (3, 8, 9)
