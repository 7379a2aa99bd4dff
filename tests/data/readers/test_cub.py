"""The CUB-200-2011 reader and its rule for pairs, against a plain reading of the same files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import cub_pairs, read_cub, write_cub
from lightning.pytorch import Trainer
from PIL import Image

from corrzoo.data import PairDataset, create_dataset
from corrzoo.data.augment import create_augment
from corrzoo.data.module import PairsDataModule
from corrzoo.data.pairs import mirror
from corrzoo.data.readers import cub
from corrzoo.data.readers.cub import CUB, LENGTHS, draw_pairs, possible_pairs, split_of
from corrzoo.heads import create_matcher
from corrzoo.types import Pair, ZooError

FEW = {"trn": 60, "val": 40, "test": 30}


def open_cub(root: Path, split: str = "trn", length: int | None = 20, **options: object) -> CUB:
    return create_dataset("cub", root, split, length=length, **options)


def edit(path: Path, old: str, new: str) -> None:
    """Replace the first occurrence in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def agrees(dataset: PairDataset, images: dict[int, dict], length: int) -> bool:
    """Whether every record is what a plain reading of the files and of the rule gives."""
    pairs = cub_pairs(images, dataset.split, length)
    assert len(dataset) == len(pairs) == length
    for i, numbers in enumerate(pairs):
        record, sides = dataset.record(i), [images[n] for n in numbers]
        common = sorted(sides[0]["parts"].keys() & sides[1]["parts"].keys())
        assert record.kps_ids.dtype == torch.int64 and record.kps_ids.tolist() == common
        assert record.category == "bird" and record.flags == {} and not record.flip
        for side, it in zip(("src", "trg"), sides, strict=True):
            path, kps, box = (getattr(record, f"{side}_{what}") for what in ("path", "kps", "box"))
            assert path == dataset.home / "images" / it["name"] and kps.dtype == torch.float64
            assert kps.tolist() == [it["parts"][part] for part in common] and box.tolist() == it["box"]
            assert getattr(record, f"{side}_alike").tolist() == [SWAPPED.get(k) in it["parts"] for k in common]
    return True


@pytest.mark.parametrize("split", FEW)
def test_records_follow_the_files_and_the_rule(tmp_path: Path, split: str) -> None:
    images = read_cub(write_cub(tmp_path, images=15, share=0.5))
    dataset = open_cub(tmp_path, split, FEW[split])
    assert agrees(dataset, images, FEW[split])
    for i in range(len(dataset)):
        record = dataset.record(i)
        assert (record.src_size, record.trg_size) == tuple(
            Image.open(p).size for p in (record.src_path, record.trg_path)
        )
    parts = [len(it["parts"]) for it in images.values() if it["split"] == split]
    assert min(parts) < 5 and len(dataset.images) <= sum(n >= 5 for n in parts)


@pytest.mark.parametrize(("split", "count"), [("trn", 3959), ("val", 520), ("test", 1419)])
def test_the_copy_in_the_shared_folder(shared: Path, split: str, count: int) -> None:
    images = read_cub(shared / "CUB_200_2011")
    assert sum(it["split"] == split and len(it["parts"]) >= 5 for it in images.values()) == count
    dataset = create_dataset("cub", shared, split)
    assert agrees(dataset, images, LENGTHS[split])
    assert dataset.title == "cub (100 species, crops)"
    assert {tuple(size) for size in dataset._index.sizes.tolist()} == {(227, 227)}


def test_splits_share_no_species() -> None:
    species = np.arange(1, 201)
    splits = split_of(species)
    for n, split in zip(species.tolist(), splits.tolist(), strict=True):
        assert split == ("test" if n % 5 == 0 else "val" if n % 10 == 1 else "trn")
    assert {split: int((splits == split).sum()) for split in LENGTHS} == {"trn": 140, "val": 20, "test": 40}


def test_length_is_one_number_or_one_for_each_split(tmp_path: Path) -> None:
    write_cub(tmp_path)
    long = open_cub(tmp_path, "trn", 50)
    short = open_cub(tmp_path, "trn", {"trn": 7, "val": 3})
    assert (len(long), len(short), len(open_cub(tmp_path, "val", {"trn": 7, "val": 3}))) == (50, 7, 3)
    assert [repr(long.record(i)) for i in range(7)] == [repr(short.record(i)) for i in range(7)]
    assert (len(open_cub(tmp_path, "trn", 50)), len(open_cub(tmp_path, "trn", 7))) == (50, 7)  # each from its own cache
    for length, message in (
        ({"tst": 3}, "cub has no split 'tst' to give a length: choose from trn, val, test"),
        (0, "cub: length 0 of split 'trn': expected at least one pair"),
        (2.5, "dataset 'cub': .*length.* Given value: 2.5"),
        (None, r"split 'trn' has \d+ pairs of images with 5 common parts, fewer than length 10000: choose a smaller"),
    ):
        with pytest.raises(ZooError, match=message):
            open_cub(tmp_path, "trn", length)


def test_all_possible_pairs_can_be_chosen(tmp_path: Path) -> None:
    images = read_cub(write_cub(tmp_path, share=0.5))
    parts = [set(it["parts"]) for it in images.values() if it["split"] == "val" and len(it["parts"]) >= 5]
    possible = sum(len(a & b) >= 5 for i, a in enumerate(parts) for b in parts[:i])
    assert 10 < possible < len(parts) * (len(parts) - 1) / 2
    assert agrees(open_cub(tmp_path, "val", possible), images, possible)
    with pytest.raises(ZooError, match=f"has {possible} pairs of images .* fewer than length {possible + 1}"):
        open_cub(tmp_path, "val", possible + 1)


def test_fewer_than_two_images_make_no_pairs() -> None:
    assert possible_pairs(np.ones((0, 15), dtype=bool)) == possible_pairs(np.ones((1, 15), dtype=bool)) == 0
    assert list(draw_pairs("val", np.ones((2, 15), dtype=bool), 1)) in ([(0, 1)], [(1, 0)])


def test_images_that_are_not_on_disk_are_left_out(tmp_path: Path) -> None:
    home = write_cub(tmp_path)
    before = open_cub(tmp_path)
    gone = before.record(0).src_path
    content = gone.read_bytes()
    gone.unlink()
    after = open_cub(tmp_path)
    assert agrees(after, read_cub(home), 20) and gone not in after.images
    assert after.fingerprint() != before.fingerprint()
    gone.write_bytes(content)
    assert open_cub(tmp_path).fingerprint() == before.fingerprint()


def test_a_changed_annotation_is_read_again(tmp_path: Path) -> None:
    home = write_cub(tmp_path)
    open_cub(tmp_path)
    edit(home / "bounding_boxes.txt", " 2.5 ", " 2.75 ")
    assert agrees(open_cub(tmp_path), read_cub(home), 20)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("images.txt", "3 ", "x ", r"images\.txt:1: expected a unique id and a file, found 'x 001\.Bird"),
        ("images.txt", "\n", "\n\t\n", r"images\.txt:2: expected a unique id"),
        ("images.txt", "3 ", "4000000000000000000000 ", r"images\.txt:1: expected a unique id"),
        ("images.txt", "5 001.Bird_1", "3 001.Bird_1", r"images\.txt:2: expected a unique id"),
        ("images.txt", "3 ", "1 ", r"image_class_labels\.txt: its images differ from images\.txt \(image 1 is"),
        ("image_class_labels.txt", "3 1\n", "", r"its images differ from images\.txt \(image 3 is only in one"),
        ("image_class_labels.txt", "3 1\n", "3 201\n", r"image_class_labels\.txt: class 201: expected 1 to 200"),
        ("image_class_labels.txt", "3 1\n", "3 1.5\n", r"class 1\.5: expected 1 to 200"),
        ("bounding_boxes.txt", "3 1.0", "3 one", r"bounding_boxes\.txt: could not convert string 'one'"),
        ("bounding_boxes.txt", "3 1.0", "3 nan", r"bounding_boxes\.txt: expected 5 columns of finite numbers"),
        ("bounding_boxes.txt", "3 1.0", "3 1.0 1.0", r"bounding_boxes\.txt: .*number of columns changed"),
        ("parts/part_locs.txt", "3 1 ", "3 2 ", r"part_locs\.txt: image 3: expected parts 1 to 15"),
        ("parts/part_locs.txt", " 1\n", " 2\n", r"part_locs\.txt: image 3: expected parts 1 to 15, each visible"),
        ("parts/part_locs.txt", "3 15 ", "5 15 ", r"part_locs\.txt: .*\(some have more rows than others\)"),
    ],
)
def test_damage_is_named(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    home = write_cub(tmp_path)
    assert (home / "images.txt").read_text().startswith("3 001.Bird_1/Bird_1_0000_3.jpg\n5 001.Bird_1/")
    edit(home / file, old, new)
    with pytest.raises(ZooError, match=message) as error:
        open_cub(tmp_path)
    assert str(home) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["images.txt", "image_class_labels.txt", "bounding_boxes.txt", "parts/part_locs.txt"])
def test_a_missing_or_empty_file_is_named(tmp_path: Path, file: str) -> None:
    home = write_cub(tmp_path)
    (home / file).write_text("")
    with pytest.raises(ZooError, match=r"differ from images\.txt|columns of finite numbers"):
        open_cub(tmp_path)
    (home / file).unlink()
    with pytest.raises(ZooError, match=rf"cub: no .*{file}: put images, images\.txt, .* into .*or fetch the dataset"):
        open_cub(tmp_path)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    write_cub(tmp_path)
    path = open_cub(tmp_path).record(0).src_path
    path.write_bytes(b"no image")
    with pytest.raises(ZooError, match=f"cannot read the image .*{path.name}"):
        open_cub(tmp_path)


def test_parts_outside_their_image_are_kept_unless_they_are_far_outside(tmp_path: Path) -> None:
    home = write_cub(tmp_path, species=[1], images=3, side=64, share=1.0)
    first = (home / "parts" / "part_locs.txt").read_text().split("\n")[0]
    for x in (-99.5, 163.5, -101, 500):
        image, part, _, y, _ = first.split(" ")
        new = f"{image} {part} {x} {y} 1"
        edit(home / "parts" / "part_locs.txt", first, new)
        first = new
        if -100 <= x <= 164:
            assert agrees(open_cub(tmp_path, "val", 3), read_cub(home), 3)
        else:
            with pytest.raises(ZooError, match=rf"images (3 and \d|\d and 3): \w+ point \[{float(x)}, .* is not in"):
                open_cub(tmp_path, "val", 3)


SWAPPED = {7: 11, 11: 7, 8: 12, 12: 8, 9: 13, 13: 9}


def by_id(sample: Pair, side: str) -> dict[int, list[float]]:
    return dict(zip(sample.kps_ids.tolist(), getattr(sample, f"{side}_kps").tolist(), strict=True))


def test_a_mirror_swaps_left_and_right_parts_and_keeps_correspondences(tmp_path: Path) -> None:
    write_cub(tmp_path)
    plain = open_cub(tmp_path, size=(40, 50))
    flipped = open_cub(tmp_path, size=(40, 50), augment=create_augment("flip"))
    count = 0
    for i in range(len(plain)):
        before, after = plain[i], flipped[i]
        assert before.mirror_ids.tolist() == [SWAPPED.get(k, k) for k in before.kps_ids.tolist()]
        assert before.kps_ids.tolist() == plain.record(i).kps_ids.tolist()
        if torch.equal(before.src_img, after.src_img):
            assert torch.equal(before.kps_ids, after.kps_ids)
            continue
        count += 1
        for side in ("src", "trg"):
            assert torch.equal(getattr(after, f"{side}_img"), getattr(before, f"{side}_img").flip(-1))
            was, now = by_id(before, side), by_id(after, side)
            for part, (x, y) in was.items():
                assert now[SWAPPED.get(part, part)] == pytest.approx([50 - x, y], abs=1e-4)
        twice = mirror(after)
        assert torch.equal(twice.kps_ids, before.kps_ids) and torch.equal(twice.mirror_ids, before.mirror_ids)
    assert 3 < count < 17


def test_ids_of_a_batch_are_padded_with_unknown(tmp_path: Path) -> None:
    write_cub(tmp_path)
    samples = [open_cub(tmp_path, size=16)[i] for i in range(6)]
    batch = PairDataset.collate(samples)
    assert batch.kps_ids.shape == batch.mirror_ids.shape == batch.kps_mask.shape and batch.kps_ids.dtype == torch.int64
    assert torch.equal(batch.kps_ids >= 0, batch.kps_mask) and not batch.kps_mask.all()
    for row, sample in zip(batch.kps_ids, samples, strict=True):
        assert row[row >= 0].tolist() == sample.kps_ids.tolist()
    assert torch.equal(batch.swapped().kps_ids, batch.kps_ids)


def test_the_title_and_the_fingerprint_tell_copies_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = {
        "cub (200 images)": dict(species=range(1, 201), images=1, side=64, share=1.0),
        "cub (200 images, crops)": dict(species=range(1, 201), images=1, side=227, share=1.0),
        "cub (7 species)": dict(share=1.0),
        "cub (7 species, crops)": dict(side=227, share=1.0),
    }
    prints = {}
    for title, options in copies.items():
        write_cub(tmp_path / title, **options)
        dataset = open_cub(tmp_path / title, "test")
        assert dataset.title == title
        prints[title] = dataset.fingerprint()
        assert open_cub(tmp_path / title, "test", 19).fingerprint() != prints[title]
    assert len(set(prints.values())) == 4
    write_cub(tmp_path / "elsewhere", **copies["cub (200 images)"])
    assert open_cub(tmp_path / "elsewhere", "test").fingerprint() == prints["cub (200 images)"]
    monkeypatch.setattr(cub, "IMAGES", 200)
    assert open_cub(tmp_path / "elsewhere", "test").title == "cub"


def test_a_species_without_images_does_not_count(tmp_path: Path) -> None:
    home = write_cub(tmp_path)
    for path in (home / "images" / "022.Bird_22").iterdir():
        path.unlink()
    assert open_cub(tmp_path, "test").title == "cub (6 species)"


def test_lightning_test_scores_it(tmp_path: Path) -> None:
    write_cub(tmp_path)
    model = create_matcher("Baseline", backbone="timm/test_vit.r160_in1k", weights="random")
    data = PairsDataModule(
        root=str(tmp_path), test=["cub"], image_size=64, batch_size=4, num_workers=0, options={"cub": {"length": 10}}
    )
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, accelerator="cpu", devices=1)
    Trainer(default_root_dir=tmp_path, **quiet).test(model, data, verbose=False)
    result = json.loads((tmp_path / "results" / "cub.json").read_text())
    assert result["pairs"] == 10 and list(result["breakdown"]["category"]) == ["bird"]
    assert result["protocol"] == "default:bbox" and 0 <= result["pck"]["pck@0.1"] <= 100
    records = [data.test_dataloader()[0].dataset.record(i) for i in range(10)]
    points = {"aware": sum(int(r.trg_alike.sum()) for r in records)}
    points["other"] = sum(len(r.trg_kps) for r in records) - points["aware"]
    assert {name: row["points"] for name, row in result["breakdown"]["geometry"].items()} == points
    assert min(points.values()) > 0
