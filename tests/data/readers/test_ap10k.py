"""The AP-10K reader against the annotations as they were written."""

import json
from pathlib import Path

import pytest
from fixtures import AP10K_ANIMALS, write_ap10k

from corrzoo.data import create_dataset
from corrzoo.types import ZooError

IMAGES = list(AP10K_ANIMALS)


@pytest.mark.parametrize(
    "split, subset, src, trg, category",
    [
        ("train", "intra-species", 1, 0, "antelope"),
        ("test", "intra-species", 0, 1, "antelope"),
        ("test", "cross-species", 1, 2, "Bovidae"),
        ("test", "cross-family", 3, 2, "all"),
    ],
)
def test_records_are_the_annotations(
    tmp_path: Path, split: str, subset: str, src: int, trg: int, category: str
) -> None:
    kps = write_ap10k(tmp_path)
    dataset = create_dataset("ap10k", tmp_path, split, size=32, subset=subset)
    record = dataset.record(0)
    assert len(dataset) == 1 and record.category == category and dataset.categories == [category]
    both = [(a, b) for a, b in zip(kps[IMAGES[src]], kps[IMAGES[trg]], strict=True) if a[2] and b[2]]
    assert 3 <= len(both) < 17
    for side, number, points in (("src", src, [a[:2] for a, _ in both]), ("trg", trg, [b[:2] for _, b in both])):
        size, (x, y, w, h) = AP10K_ANIMALS[IMAGES[number]]
        assert getattr(record, f"{side}_kps").tolist() == points
        assert getattr(record, f"{side}_box").tolist() == [x, y, x + w, y + h]
        assert getattr(record, f"{side}_size") == size
        assert getattr(record, f"{side}_path") == tmp_path / "ap-10k" / "JPEGImages" / f"{IMAGES[number]}.jpg"
    assert dataset[0].src_img.shape == (3, 32, 32)
    visible = [a[2] and b[2] for a, b in zip(kps[IMAGES[src]], kps[IMAGES[trg]], strict=True)]
    assert record.kps_ids.tolist() == [k for k in range(17) if visible[k]]
    for side, number in (("src", src), ("trg", trg)):
        want = []
        for k in record.kps_ids.tolist():
            group = next((g for g in ((5, 8), (6, 9, 12, 15), (7, 10, 13, 16), (11, 14)) if k in g), (k,))
            want.append(any(kps[IMAGES[number]][other][2] > 0 for other in group if other != k))
        assert getattr(record, f"{side}_alike").tolist() == want and len(want) == len(both)


def test_an_annotation_that_changes_is_read_again(tmp_path: Path) -> None:
    write_ap10k(tmp_path)
    before = create_dataset("ap10k", tmp_path, "test").record(0).trg_box
    path = tmp_path / "ap-10k" / "ImageAnnotation" / f"{IMAGES[1]}.json"
    path.write_text(path.read_text().replace("49.5", "44.25"))
    after = create_dataset("ap10k", tmp_path, "test").record(0).trg_box
    assert (before[2], after[2]) == (49.5, 44.25)


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"put JPEGImages, ImageAnnotation and PairAnnotation into .*prepare_ap10k"):
        create_dataset("ap10k", tmp_path, "test")
    write_ap10k(tmp_path)
    with pytest.raises(ZooError, match="Got value: cross-specie: did you mean 'cross-species'"):
        create_dataset("ap10k", tmp_path, "test", subset="cross-specie")
    with pytest.raises(ZooError, match="cross-family has no training pairs"):
        create_dataset("ap10k", tmp_path, "trn", subset="cross-family")
    path = tmp_path / "ap-10k" / "ImageAnnotation" / f"{IMAGES[1]}.json"
    whole = path.read_text()
    for text, message in (
        (whole.replace("bbox", "box"), r"000000000012\.json: not an annotation of AP-10K \(KeyError\('bbox'\)\)"),
        (whole.replace("49.5", "59.5"), r"target box \[0\.0, 0\.0, 59\.5, 40\.0\] is not .* in its 50x50 image"),
        (whole[:40], r"000000000012\.json: not an annotation"),
    ):
        path.write_text(text)
        with pytest.raises(ZooError, match=message):
            create_dataset("ap10k", tmp_path, "test")
    path.unlink()
    with pytest.raises(ZooError, match=r"no annotation .*000000000012\.json"):
        create_dataset("ap10k", tmp_path, "test")


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"keypoints": [1, 1, 2] * 16}, r"000000000012\.json: not an annotation of AP-10K .*size 48"),
        ({"bbox": ["1", "2", "3", "x"]}, r"000000000012\.json: not an annotation of AP-10K"),
        ("[" * 100_000, r"000000000012\.json: not an annotation of AP-10K"),
    ],
)
def test_an_invalid_image_annotation_is_named(tmp_path: Path, edit: dict | str, message: str) -> None:
    write_ap10k(tmp_path)
    path = tmp_path / "ap-10k" / "ImageAnnotation" / f"{IMAGES[1]}.json"
    path.write_text(edit if isinstance(edit, str) else json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ZooError, match=message):
        create_dataset("ap10k", tmp_path, "test")


@pytest.mark.parametrize("place", ["", "Bovidae/antelope/.", "x" * 300 + ".json"])
def test_a_pair_that_names_no_annotation_is_an_error(tmp_path: Path, place: str) -> None:
    write_ap10k(tmp_path)
    (path,) = (tmp_path / "ap-10k/PairAnnotation/test").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"src_json_path": place}))
    with pytest.raises(ZooError, match=r"no annotation .*named by a pair .*: restore it"):
        create_dataset("ap10k", tmp_path, "test")


def test_numbers_in_quotation_marks_are_numbers(tmp_path: Path) -> None:
    write_ap10k(tmp_path)
    path = tmp_path / "ap-10k" / "ImageAnnotation" / f"{IMAGES[1]}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bbox": ["1", "2", "3", "4"]}))
    assert create_dataset("ap10k", tmp_path, "test").record(0).trg_box.tolist() == [1, 2, 4, 6]


def test_a_pair_that_is_edited_in_place_is_noticed_on_request(tmp_path: Path) -> None:
    write_ap10k(tmp_path)
    before = create_dataset("ap10k", tmp_path, "test").record(0)
    (path,) = (tmp_path / "ap-10k/PairAnnotation/test").iterdir()
    swapped = {f"{side}_json_path": json.loads(path.read_text())[f"{other}_json_path"]
               for side, other in (("src", "trg"), ("trg", "src"))}  # fmt: skip
    path.write_text(json.dumps(swapped))
    # At the start nobody asks for the states of 261,000 files.
    assert repr(create_dataset("ap10k", tmp_path, "test").record(0)) == repr(before)
    assert create_dataset("ap10k", tmp_path, "test", refresh=True).record(0).src_path == before.trg_path
