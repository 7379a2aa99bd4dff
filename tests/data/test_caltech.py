"""The Caltech-101 reader: outlines instead of keypoints."""

from pathlib import Path

import pytest
from fixtures import write_caltech

from corrzoo.data import create_dataset
from corrzoo.types import ZooError


def test_records_are_the_annotations(tmp_path: Path) -> None:
    outlines = write_caltech(tmp_path)
    dataset = create_dataset("caltech101", tmp_path, "test", size=24)
    assert (
        len(dataset) == 2 and len(set(dataset.categories)) == 101 and dataset.categories == sorted(dataset.categories)
    )
    for i, (src, trg) in enumerate(outlines):
        record = dataset.record(i)
        assert record.src_polygon.tolist() == src and record.trg_polygon.tolist() == trg
        assert record.src_kps.shape == record.trg_kps.shape == (0, 2)
    assert [dataset.record(i).category for i in range(2)] == ["Faces", "yin_yang"]
    assert dataset.record(1).trg_size == (30, 36)


def test_samples_have_no_keypoints_and_grey_becomes_rgb(tmp_path: Path) -> None:
    write_caltech(tmp_path)
    dataset = create_dataset("caltech101", tmp_path, "test", size=24)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch.src_kps.shape == (2, 0, 2) and batch.kps_mask.shape == (2, 0)
    assert batch.trg_img.shape == (2, 3, 24, 24) and (batch.trg_img[1] == 77).all()


def test_bad_outlines_are_named(tmp_path: Path) -> None:
    write_caltech(tmp_path)
    path = tmp_path / "Caltech-101" / "test_pairs_caltech_with_category.csv"
    start = "x/Faces/image_0001.jpg,x/Faces/image_0002.jpg"
    for row, message in (
        (f'{start},1,"1,2,3","1,2","1,2","1,2"', "csv:2: these are no keypoints"),
        (f'{start},1,"1,2","1,nan","1,2","1,2"', "csv:2: source point .*nan"),
        (f'{start},102,"1,2","1,2","1,2","1,2"', "csv:2: unknown category '102'"),
        (f'{start},1,"1,2","1,2","1,2"', "csv:2: expected 7 columns"),
    ):
        path.write_text(f"header\n{row}\n")
        with pytest.raises(ZooError, match=message):
            create_dataset("caltech101", tmp_path, "test")
