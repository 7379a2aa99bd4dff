"""The PF-PASCAL reader in the three layouts that bundles of it have."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from fixtures import NAN, PASCAL_KPS, PASCAL_PAIRS, write_pfpascal

from corrzoo.data import create_dataset
from corrzoo.types import ZooError


@pytest.mark.parametrize("layout", ["hpf", "official", "ncnet"])
@pytest.mark.parametrize("split", ["trn", "val", "test"])
def test_records_are_the_annotations(tmp_path: Path, layout: str, split: str) -> None:
    write_pfpascal(tmp_path, layout)
    dataset = create_dataset("pfpascal", tmp_path, split)
    pairs = PASCAL_PAIRS * 2 if split == "trn" else PASCAL_PAIRS
    assert len(dataset) == len(pairs)
    for i, (src, trg) in enumerate(pairs):
        record = dataset.record(i)
        category, src_size, src_kps, src_box = PASCAL_KPS[src]
        _, trg_size, trg_kps, trg_box = PASCAL_KPS[trg]
        kept = [k for k in range(len(src_kps)) if not np.isnan([*src_kps[k], *trg_kps[k]]).any()]
        assert 0 < len(kept)
        assert record.src_kps.tolist() == [src_kps[k] for k in kept]
        assert record.trg_kps.tolist() == [trg_kps[k] for k in kept]
        assert (record.src_path.stem, record.trg_path.stem, record.category) == (src, trg, category)
        assert (record.src_size, record.trg_size) == (src_size, trg_size)
        assert record.src_box.tolist() == src_box and record.trg_box.tolist() == trg_box
        assert record.src_box.dtype == torch.float64  # stored as uint16, where 5 - 55 would be 65486
        assert record.flip == (split == "trn" and i >= 2)
        assert record.flags == {}


def test_keypoints_of_the_list_serve_without_mats(tmp_path: Path) -> None:
    write_pfpascal(tmp_path / "a")
    write_pfpascal(tmp_path / "b", "ncnet", mats=False)
    with_mats = create_dataset("pfpascal", tmp_path / "a", "test")
    inline = create_dataset("pfpascal", tmp_path / "b", "test")
    for i in range(2):
        assert inline.record(i).src_kps.tolist() == with_mats.record(i).src_kps.tolist()
        assert inline.record(i).trg_kps.tolist() == with_mats.record(i).trg_kps.tolist()
        assert inline.record(i).src_box is None
    assert inline[0].src_box.isnan().all()
    with pytest.raises(ZooError, match=r"no annotation .*car.2008_000010\.mat"):
        create_dataset("pfpascal", tmp_path / "b", "trn")


def test_flip_is_optional_and_never_read_from_a_test_list(tmp_path: Path) -> None:
    write_pfpascal(tmp_path)
    rows = (tmp_path / "PF-PASCAL" / "trn_pairs.csv").read_text().splitlines()
    (tmp_path / "PF-PASCAL" / "trn_pairs.csv").write_text("\n".join(row.rsplit(",", 1)[0] for row in rows))
    assert not any(record.flip for record in map(create_dataset("pfpascal", tmp_path, "trn").record, range(4)))
    (tmp_path / "PF-PASCAL" / "test_pairs.csv").write_text("\n".join(rows))
    assert not any(record.flip for record in map(create_dataset("pfpascal", tmp_path, "test").record, range(4)))


def test_mirrored_pair_is_the_mirror_image(tmp_path: Path) -> None:
    write_pfpascal(tmp_path)
    dataset = create_dataset("pfpascal", tmp_path, "trn", size=(32, 40))
    plain, mirrored = dataset[0], dataset[2]
    for side, size, box in (("src", 60, [5, 5, 55, 35]), ("trg", 50, [0, 2, 49, 70])):
        before, after = getattr(plain, f"{side}_img"), getattr(mirrored, f"{side}_img")
        assert torch.equal(after, torch.from_numpy(before.numpy()[:, :, ::-1].copy()))
        before, after = getattr(plain, f"{side}_kps"), getattr(mirrored, f"{side}_kps")
        for (x, y), (new_x, new_y) in zip(before.tolist(), after.tolist(), strict=True):
            assert (new_x, new_y) == pytest.approx((40 - x, y))
        x1, y1, x2, y2 = getattr(plain, f"{side}_box").tolist()
        assert getattr(mirrored, f"{side}_box").tolist() == [size - x2, y1, size - x1, y2] == box
    assert dataset.record(2).src_kps.tolist() == dataset.record(0).src_kps.tolist()
    numbers = [int(number) for sample in (plain, mirrored) for number in (sample.src_id, sample.trg_id)]
    assert numbers == [0, 1, 4, 5]  # mirrored images are images of their own, behind the list's four
    again = dataset[2]
    assert torch.equal(again.src_kps, mirrored.src_kps) and torch.equal(again.src_img, mirrored.src_img)


def mat(root: Path) -> Path:
    return root / "PF-PASCAL" / "Annotations" / "car" / "2009_000020.mat"


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    write_pfpascal(tmp_path)
    kps = np.array([[NAN, NAN], [20, 20], [NAN, NAN], [NAN, NAN]])
    scipy.io.savemat(mat(tmp_path), {"kps": kps, "bbox": [[1, 2, 50, 70]]})
    with pytest.raises(ZooError, match=r"val_pairs\.csv:2: no keypoint"):
        create_dataset("pfpascal", tmp_path, "val")


def test_bad_mats_are_named(tmp_path: Path) -> None:
    write_pfpascal(tmp_path)
    scipy.io.savemat(mat(tmp_path), {"kps": np.ones((3, 2)), "bbox": [[1, 2, 50, 70]]})
    with pytest.raises(ZooError, match=r"val_pairs\.csv:2: 4 source but 3 target"):
        create_dataset("pfpascal", tmp_path, "val")
    scipy.io.savemat(mat(tmp_path), {"kps": np.ones((4, 2))})
    with pytest.raises(ZooError, match=r"2009_000020\.mat: no variable 'bbox'"):
        create_dataset("pfpascal", tmp_path, "val")
    for boxes in ([["a", "b", "c", "d"]], [[1, 2, 50, 70j]]):
        scipy.io.savemat(mat(tmp_path), {"kps": np.ones((4, 2)), "bbox": np.array(boxes)})
        with pytest.raises(ZooError, match=r"2009_000020\.mat: 'bbox' is not a matrix of real numbers"):
            create_dataset("pfpascal", tmp_path, "val")
    version73 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(384) + b"\x89HDF\r\n\x1a\n" + bytes(99)
    mat(tmp_path).write_bytes(version73)
    with pytest.raises(ZooError, match=r"2009_000020\.mat .*HDF.*or save it with -v7"):
        create_dataset("pfpascal", tmp_path, "val")
    mat(tmp_path).write_bytes(b"MATLAB" * 40)
    with pytest.raises(ZooError, match=r"cannot read the annotation .*2009_000020\.mat"):
        create_dataset("pfpascal", tmp_path, "val")
    mat(tmp_path).unlink()
    with pytest.raises(ZooError, match=r"no annotation .*2009_000020\.mat"):
        create_dataset("pfpascal", tmp_path, "val")


@pytest.mark.parametrize(
    "row, message",
    [
        ("a/2008_000010.jpg,a/2009_000020.jpg,21,0", r"val_pairs\.csv:2: unknown category '21'"),
        ("a/2008_000010.jpg,a/2009_000020.jpg,car,0", r"val_pairs\.csv:2: unknown category 'car'"),
        ("a/2008_000010.jpg,a/2009_000020.jpg", r"val_pairs\.csv:2: expected 3 columns"),
        ("a/2008_000011.jpg,a/2009_000020.jpg,7,0", r"no annotation .*2008_000011\.mat"),
        ("", "no pairs"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    write_pfpascal(tmp_path)
    (tmp_path / "PF-PASCAL" / "val_pairs.csv").write_text(f"source,target,class,flip\n{row}\n")
    with pytest.raises(ZooError, match=message):
        create_dataset("pfpascal", tmp_path, "val")


def test_bad_inline_keypoints_are_named(tmp_path: Path) -> None:
    write_pfpascal(tmp_path, mats=False)
    start = "a/2008_000010.jpg,a/2009_000020.jpg,7"
    for cells, message in (
        ("1;2,1,1,1", "expected keypoints"),
        ("1;x,1;2,1;2,1;2", "expected keypoints"),
        ("1;2,1;2,3,3", "2 source"),
    ):
        (tmp_path / "PF-PASCAL" / "test_pairs.csv").write_text(f"header\n{start},{cells}\n")
        with pytest.raises(ZooError, match=rf"test_pairs\.csv:2: .*{message}"):
            create_dataset("pfpascal", tmp_path, "test")


def test_a_missing_list_is_an_error_that_names_the_alternatives(tmp_path: Path) -> None:
    write_pfpascal(tmp_path)
    (tmp_path / "PF-PASCAL" / "trn_pairs.csv").unlink()
    with pytest.raises(ZooError, match=r"trn_pairs\.csv \(nor train_pairs\.csv, .*image_pairs.train_pairs\.csv\)"):
        create_dataset("pfpascal", tmp_path, "trn")
