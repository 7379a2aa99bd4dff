"""The PF-WILLOW reader: its list, its raw folders, and the real benchmark."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from fixtures import WILLOW, write_pfwillow
from PIL import Image

from corrzoo.data import create_dataset
from corrzoo.types import Record, ZooError


@pytest.mark.parametrize("inner", ["", "PF-dataset"])
@pytest.mark.parametrize("lists", [True, False])
def test_records_are_the_annotations(tmp_path: Path, lists: bool, inner: str) -> None:
    points = write_pfwillow(tmp_path, lists, mats=not lists, inner=inner)
    dataset = create_dataset("pfwillow", tmp_path, "test")
    assert len(dataset) == 20 and len(dataset.images) == 20 and dataset.categories == WILLOW
    names = [("a_001", "b_002"), ("b_002", "a_001")]
    for i in range(20):
        record, category = dataset.record(i), WILLOW[i // 2]
        src, trg = names[i % 2]
        assert (record.category, record.src_path.stem, record.trg_path.stem) == (category, src, trg)
        assert np.array_equal(record.src_kps.T, points[f"{category}/{src}"])
        assert np.array_equal(record.trg_kps.T, points[f"{category}/{trg}"])
        assert record.src_size == Image.open(record.src_path).size
        assert record.src_box is None and record.flags == {}


def test_only_a_test_split(tmp_path: Path) -> None:
    write_pfwillow(tmp_path)
    with pytest.raises(ZooError, match="pfwillow has no split 'trn': choose from test"):
        create_dataset("pfwillow", tmp_path, "trn")


def test_a_missing_sub_class_or_mat_is_an_error(tmp_path: Path) -> None:
    write_pfwillow(tmp_path, lists=False)
    (tmp_path / "PF-WILLOW" / "duck(S)" / "b_002.mat").unlink()
    with pytest.raises(ZooError, match=r"no annotation .*duck\(S\).b_002\.mat"):
        create_dataset("pfwillow", tmp_path, "test")
    (tmp_path / "PF-WILLOW" / "duck(S)").rename(tmp_path / "PF-WILLOW" / "goose(S)")
    with pytest.raises(ZooError, match=r"no .*duck\(S\): put"):
        create_dataset("pfwillow", tmp_path, "test")


def test_bad_rows_are_named(tmp_path: Path) -> None:
    write_pfwillow(tmp_path)
    path = tmp_path / "PF-WILLOW" / "test_pairs.csv"
    good = path.read_text().splitlines()
    for row, message in (
        (good[1].replace("car(G)", "car(X)"), r"no image .*car\(X\).a_001\.png"),
        (good[1].replace("a_001", "c_003"), r"no image .*car\(G\).c_003\.png"),
        (good[1].rsplit(",", 1)[0], "test_pairs.csv:2: expected 42 columns or more, found 41"),
        (good[1].rsplit(",", 1)[0] + ",nan", "test_pairs.csv:2: target point .*nan"),
    ):
        path.write_text(f"{good[0]}\n{row}\n")
        with pytest.raises(ZooError, match=message):
            create_dataset("pfwillow", tmp_path, "test")


def by_names(root: Path) -> dict[tuple[str, str, str], Record]:
    dataset = create_dataset("pfwillow", root, "test")
    records = [dataset.record(i) for i in range(len(dataset))]
    return {(record.category, record.src_path.name, record.trg_path.name): record for record in records}


def test_the_real_benchmark(shared: Path, tmp_path: Path) -> None:
    listed = by_names(shared)
    assert len(listed) == 900
    assert {category: sum(key[0] == category for key in listed) for category in WILLOW} == dict.fromkeys(WILLOW, 90)
    (tmp_path / "PF-WILLOW").mkdir()
    for category in WILLOW:
        os.symlink((shared / "PF-WILLOW" / category).resolve(), tmp_path / "PF-WILLOW" / category)
    raw = by_names(tmp_path)
    assert listed.keys() == raw.keys()
    for key, record in listed.items():
        assert record.src_kps.shape == record.trg_kps.shape == (10, 2)
        assert record.src_box is None and record.trg_box is None
        assert abs(record.src_kps - raw[key].src_kps).max() < 1e-9
        assert abs(record.trg_kps - raw[key].trg_kps).max() < 1e-9
        assert record.src_size == raw[key].src_size
    for image in {record.src_path for record in listed.values()}:
        annotation = scipy.io.loadmat(image.with_suffix(".mat"))["pts_coord"]
        record = next(record for record in listed.values() if record.src_path == image)
        assert np.allclose(record.src_kps.T, annotation, atol=1e-9)
        assert record.src_size == Image.open(image).size
