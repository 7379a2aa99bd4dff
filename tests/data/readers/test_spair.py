"""The SPair-71k reader against the annotations as they were written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures import SPAIR_KPS, write_spair, write_spair_u, write_synthetic_spair

from corrzoo.data import create_dataset
from corrzoo.data.pairs import mirror
from corrzoo.types import ZooError


@pytest.mark.parametrize("split", ["trn", "val", "test"])
def test_records_are_the_annotations(tmp_path: Path, split: str) -> None:
    written = write_spair(tmp_path)[split]
    dataset = create_dataset("spair71k", tmp_path, split)
    assert len(dataset) == len(written)
    for i, pair in enumerate(written):
        record = dataset.record(i)
        assert record.src_path == tmp_path / "SPair-71k" / "JPEGImages" / pair["category"] / pair["src_imname"]
        assert record.trg_path.name == pair["trg_imname"]
        assert record.src_kps.dtype == torch.float64
        assert record.src_kps.tolist() == pair["src_kps"] and record.trg_kps.tolist() == pair["trg_kps"]
        assert record.src_size == tuple(pair["src_imsize"][:2]) and record.trg_size == tuple(pair["trg_imsize"][:2])
        assert record.src_box.tolist() == pair["src_bndbox"] and record.trg_box.tolist() == pair["trg_bndbox"]
        assert record.category == pair["category"] and not record.flip
        assert record.src_polygon is None and record.kps_ids.tolist() == [int(k) for k in pair["kps_ids"]]
        assert record.flags == {
            "viewpoint": pair["viewpoint_variation"],
            "scale": pair["scale_variation"],
            "truncation": pair["truncation"],
            "occlusion": pair["occlusion"],
        }


def test_sample_carries_flags_category_and_boxes(tmp_path: Path) -> None:
    pair = write_spair(tmp_path)["trn"][3]
    dataset = create_dataset("spair71k", tmp_path, "train", size=32)
    sample = dataset[3]
    assert dataset.categories[sample.category] == "cat" and len(dataset.categories) == 18
    assert sample.difficulty.tolist() == [7 % 3, 1, 7 % 4, 3]
    assert sample.src_box.tolist() == pair["src_bndbox"]
    assert sample.index == 3
    assert [dataset.images[n].name for n in (sample.src_id, sample.trg_id)] == [pair["src_imname"], pair["trg_imname"]]


def test_ids_are_read_from_the_annotation_and_a_mirror_swaps_left_and_right(tmp_path: Path) -> None:
    """Of aeroplanes 12 and 13 are twins, and 6 and 7; of cats 0 and 1."""
    write_spair(tmp_path)
    change(tmp_path, kps_ids=["3", "12", "7"])
    dataset = create_dataset("spair71k", tmp_path, "trn", size=32)
    batch = dataset.collate([dataset[1], mirror(dataset[1]), dataset[3]])
    assert batch.kps_ids.tolist() == [[3, 12, 7], [3, 13, 6], [0, -1, -1]]
    assert batch.mirror_ids.tolist() == [[3, 13, 6], [3, 12, 7], [1, -1, -1]]
    change(tmp_path, kps_ids=None)
    assert create_dataset("spair71k", tmp_path, "trn", refresh=True).record(1).kps_ids is None


def write_image_annotations(root: Path, parts: dict[str, list[int]]) -> Path:
    """Image annotations of `SPAIR_KPS`, in which parts that are not visible are null. Returns their folder."""
    folder = root / "SPair-71k" / "ImageAnnotation"
    for name, visible in parts.items():
        path = folder / Path(name).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"kps": {str(k): [k, k] if k in visible else None for k in range(30)}}))
    return folder


def test_parts_that_look_alike_are_searched_among_all_parts_of_an_image(tmp_path: Path) -> None:
    """Of aeroplanes 12 and 13 look alike, and 6 and 7; of cats 2 and 3, and 9 to 12."""
    write_spair(tmp_path)
    change(tmp_path, kps_ids=["3", "12", "7"])  # of planes[1] and planes[0]
    planes, cats = list(SPAIR_KPS)[:3], list(SPAIR_KPS)[3:]
    visible = {planes[0]: [3, 6, 7, 12], planes[1]: [3, 7, 12, 13], planes[2]: [0, 1], cats[0]: [0, 1], cats[1]: [0]}
    folder = write_image_annotations(tmp_path, visible)
    dataset = create_dataset("spair71k", tmp_path, "trn", size=32)
    record = dataset.record(1)
    assert record.src_alike.tolist() == [False, True, False]  # 13 is visible in the source alone
    assert record.trg_alike.tolist() == [False, False, True]
    batch = dataset.collate([dataset[1], mirror(dataset[1]), dataset[3]])
    assert batch.src_alike.tolist() == [[False, True, False], [False, True, False], [False] * 3]
    assert batch.swapped().src_alike.tolist() == batch.trg_alike.tolist()
    assert batch.trg_alike.tolist() == [[False, False, True], [False, False, True], [False] * 3]
    write_image_annotations(tmp_path, {planes[0]: [3, 7, 12]})
    assert not create_dataset("spair71k", tmp_path, "trn").record(1).trg_alike.any()  # it was read again
    path = folder / Path(planes[1]).with_suffix(".json")
    path.write_text("[]")
    with pytest.raises(ZooError, match=f"{path.name}: not an image annotation of SPair-71k"):
        create_dataset("spair71k", tmp_path, "trn")
    path.unlink()
    with pytest.raises(ZooError, match=f"no annotation .*{path.name}"):
        create_dataset("spair71k", tmp_path, "trn")


def test_synthetic_spair_equals_plain_loops(tmp_path: Path, shared: Path) -> None:
    home = write_synthetic_spair(tmp_path, pairs_per_split=24, images_per_category=4, size=64)
    groups = json.loads((shared / "specs" / "symmetry.json").read_text())["spair71k"]
    dataset, found = create_dataset("spair71k", tmp_path, "test", size=32), 0
    for i in range(len(dataset)):
        record, sample = dataset.record(i), dataset[i]
        for side in ("src", "trg"):
            image = getattr(record, f"{side}_path")
            note = json.loads((home / "ImageAnnotation" / image.parent.name / f"{image.stem}.json").read_text())
            want = []
            for part in record.kps_ids.tolist():
                ((*group,),) = [g for g in groups[record.category]["groups"] if part in g] or [[part]]
                want.append(any(note["kps"].get(str(other)) for other in group if other != part))
            assert getattr(record, f"{side}_alike").tolist() == getattr(sample, f"{side}_alike").tolist() == want
            found += sum(want)
    assert found
    shutil.rmtree(home / "ImageAnnotation")
    assert not any(create_dataset("spair71k", tmp_path, "test").record(i).trg_alike.any() for i in range(len(dataset)))


def test_small_layout(tmp_path: Path) -> None:
    write_spair(tmp_path)
    assert len(create_dataset("spair71k", tmp_path, "trn", layout="small")) == 2
    assert len(create_dataset("spair71k", tmp_path, "trn")) == 4
    with pytest.raises(ZooError, match="Got value: big: expected one of large, small"):
        create_dataset("spair71k", tmp_path, "trn", layout="big")


@pytest.mark.parametrize("colon", ["_", "%3A"])
def test_file_names_without_a_colon(tmp_path: Path, colon: str) -> None:
    written = write_spair(tmp_path, colon)["val"]
    assert create_dataset("spair71k", tmp_path, "val").record(1).src_kps.tolist() == written[1]["src_kps"]


def change(root: Path, **values: object) -> Path:
    """Write other values into the second training pair; None takes a field away."""
    (path,) = (root / "SPair-71k" / "PairAnnotation" / "trn").glob("000002*.json")
    pair = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in pair.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    "values, message",
    [
        ({"src_kps": [], "trg_kps": [], "kps_ids": []}, "no keypoints in common"),
        ({"kps_ids": ["0", "1"]}, "3 keypoints but 2 ids: correct"),
        ({"kps_ids": ["0", "1", "-1"]}, r"keypoint ids \['0', '1', '-1'\]: expected a list of 0, 1, 2"),
        ({"kps_ids": ["0", "1", "two"]}, "expected keypoint ids"),
        ({"kps_ids": ["0", "1", 2**70]}, "expected keypoint ids"),
        ({"kps_ids": [["0", "1", "2"]]}, "keypoint ids .*: expected a list"),
        ({"src_kps": [[8, 8], [float("nan"), 30], [40, 52]]}, "source point .*nan.* is not in its 48x60 image"),
        ({"src_kps": [[8, 8], [None, 30], [40, 52]]}, "source point .*nan"),
        ({"trg_kps": [[10, 12], [66.5, 20], [50, 40]]}, r"target point \[66.5, 20.0\] is not in its 64x48 image"),
        ({"trg_kps": [[10, -1.5], [6, 20], [50, 40]]}, r"target point \[10.0, -1.5\]"),
        ({"src_kps": [[8, 8], [24, 30]]}, "2 source but 3 target"),
        ({"src_kps": [[8, 8, 1], [24, 30, 1], [1, 1, 1]]}, r"shape \(n, 2\), found \(3, 3\)"),
        ({"src_kps": [[8, 8], [24], [1, 1]]}, "expected keypoints"),
        ({"src_kps": "left"}, "expected keypoints"),
        ({"src_bndbox": [40, 1, 10, 30]}, r"source box \[40.0, 1.0, 10.0, 30.0\]"),
        ({"trg_bndbox": [1, 1, 640, 48]}, "target box .* 64x48 image"),
        ({"trg_bndbox": [1, 1, 64]}, "expected a box"),
        ({"category": "areoplane"}, "unknown category 'areoplane': did you mean 'aeroplane'"),
        ({"src_imsize": [47, 60, 3]}, r"size \(47, 60\) here and \(48, 60\) elsewhere"),
        ({"src_imname": "2008_999999.jpg"}, "no image .*2008_999999.jpg"),
        ({"truncation": None}, "not an annotation of SPair-71k .*truncation"),
    ],
)
def test_bad_annotation_is_named(tmp_path: Path, values: dict, message: str) -> None:
    write_spair(tmp_path)
    path = change(tmp_path, **values)
    with pytest.raises(ZooError, match=message) as error:
        create_dataset("spair71k", tmp_path, "trn")
    assert "\n" not in str(error.value)
    assert path.name in str(error.value) or "999999" in message


def test_points_on_the_border_are_fine(tmp_path: Path) -> None:
    write_spair(tmp_path)
    change(tmp_path, src_kps=[[0, 0], [48, 60], [49, -1]], src_bndbox=[1, 1, 48, 60])
    assert create_dataset("spair71k", tmp_path, "trn").record(1).src_kps[2].tolist() == [49, -1]


def test_broken_json_is_named(tmp_path: Path) -> None:
    write_spair(tmp_path)
    path = change(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ZooError, match=f"{path.name}: not an annotation"):
        create_dataset("spair71k", tmp_path, "trn")


def test_missing_parts_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no .*SPair-71k: put .*download=true.*--data.download true.*demo.yaml"):
        create_dataset("spair71k", tmp_path, "trn")
    write_spair(tmp_path)
    home = tmp_path / "SPair-71k"
    (home / "Layout" / "large" / "val.txt").unlink()
    with pytest.raises(ZooError, match=r"no .*large.val\.txt"):
        create_dataset("spair71k", tmp_path, "val")
    shutil.rmtree(home / "PairAnnotation" / "test")
    with pytest.raises(ZooError, match=r"no .*PairAnnotation.test"):
        create_dataset("spair71k", tmp_path, "test")
    change(tmp_path).unlink()
    with pytest.raises(ZooError, match=r"no annotation .*000002-.*, listed in .*trn\.txt"):
        create_dataset("spair71k", tmp_path, "trn")


def test_empty_split(tmp_path: Path) -> None:
    write_spair(tmp_path)
    (tmp_path / "SPair-71k" / "Layout" / "large" / "val.txt").write_text("\n")
    with pytest.raises(ZooError, match="no pairs"):
        create_dataset("spair71k", tmp_path, "val")


def test_missing_image_is_found_at_the_start_and_after_caching(tmp_path: Path) -> None:
    write_spair(tmp_path)
    create_dataset("spair71k", tmp_path, "trn")
    (tmp_path / "SPair-71k" / "JPEGImages" / "cat" / "2009_000005.jpg").unlink()
    with pytest.raises(ZooError, match=r"no image .*cat.2009_000005\.jpg"):
        create_dataset("spair71k", tmp_path, "trn")


@pytest.mark.parametrize(
    "inside", ["SPair-U/PairAnnotation", "SPair-71k/ExtraPairAnnotation", "SPair-U/ExtraPairAnnotation"]
)
def test_spair_u_has_spairs_images_and_its_own_keypoints(tmp_path: Path, inside: str) -> None:
    write_spair(tmp_path)
    first, _, third = write_spair_u(tmp_path, inside)
    dataset = create_dataset("spair71k_u", tmp_path, "test", size=32)
    assert len(dataset) == 2  # a pair without a keypoint in common has no PCK
    for i, pair in enumerate((first, third)):
        record = dataset.record(i)
        assert record.src_kps.tolist() == pair["src_kps"] and record.trg_kps.tolist() == pair["trg_kps"]
        assert record.src_path == tmp_path / "SPair-71k" / "JPEGImages" / pair["category"] / pair["src_imname"]
        assert (
            record.trg_box.tolist() == pair["trg_bndbox"] and record.flags["viewpoint"] == pair["viewpoint_variation"]
        )
    assert torch.equal(dataset[1].src_img, create_dataset("spair71k", tmp_path, "test", size=32)[2].src_img)


def test_spair_u_is_a_test_set_whose_absence_is_one_line(tmp_path: Path) -> None:
    write_spair(tmp_path)
    with pytest.raises(ZooError, match=r"no .*SPair-U/PairAnnotation/test .*SPair-U\.zip") as error:
        create_dataset("spair71k_u", tmp_path, "test")
    assert "\n" not in str(error.value)
    with pytest.raises(ZooError, match="spair71k_u has no split 'trn'"):
        create_dataset("spair71k_u", tmp_path, "trn")


def test_a_pair_of_spair_u_that_gets_its_first_keypoints_counts_from_the_next_start(tmp_path: Path) -> None:
    write_spair(tmp_path)
    bare = write_spair_u(tmp_path)[1]
    assert len(create_dataset("spair71k_u", tmp_path, "test")) == 2
    path = tmp_path / "SPair-U/PairAnnotation/test" / f"{bare['filename']}.json"
    path.write_text(json.dumps(bare | {"src_kps": [[3, 4]], "trg_kps": [[5, 6]], "kps_ids": ["2"]}))
    dataset = create_dataset("spair71k_u", tmp_path, "test")
    assert len(dataset) == 3 and dataset.record(1).src_kps.tolist() == [[3, 4]]
