"""The Caltech-101 reader: outlines instead of keypoints, and `lightning test` on them."""

import csv
import json
from pathlib import Path

import pytest
import torch
from fixtures import write_caltech
from lightning.pytorch import Trainer

from corrzoo.callbacks import MatchImages
from corrzoo.data import create_dataset
from corrzoo.data.module import PairsDataModule
from corrzoo.matcher import Matcher
from corrzoo.scoring.label_transfer import polygon_mask
from corrzoo.types import Match, ZooError


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
        (f'{start},1,"1,2,3","1,2","1,2","1,2"', "csv:2: expected keypoints"),
        (f'{start},1,"1,2,3","1,nan,3","1,2,3","1,2,1"', "csv:2: source point .*nan"),
        (f'{start},102,"1,2","1,2","1,2","1,2"', "csv:2: unknown category '102'"),
        (f'{start},1,"1,2,3","1,2","1,2"', "csv:2: expected 7 columns"),
        (f'{start},1,"1,2","1,2","1,2,3","1,2,1"', "csv:2: an outline of fewer than 3 points"),
        (f'{start},1,"1,2' + "3" * 140_000, "csv:2: field larger than"),
    ):
        path.write_text(f"header\n{row}\n")
        with pytest.raises(ZooError, match=message):
            create_dataset("caltech101", tmp_path, "test")


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".webp"])
def test_a_list_without_a_header_is_refused_and_loses_no_pair(tmp_path: Path, suffix: str) -> None:
    write_caltech(tmp_path)
    path = tmp_path / "Caltech-101" / "test_pairs_caltech_with_category.csv"
    path.write_text(path.read_text().partition("\n")[2].replace(".jpg", suffix))
    with pytest.raises(ZooError, match=r"with_category\.csv: its first line is a pair"):
        create_dataset("caltech101", tmp_path, "test")


SIDE, SHIFT = 32, (3.0, -2.0)


class Shifting(Matcher):
    """Everything moves by SHIFT, in pixels of the network image, whichever way one asks."""

    def match(self, src, trg):
        return Match(torch.tensor(SHIFT).view(1, 2, 1, 1).expand(len(src.image), 2, 4, 4))


def by_loops(record) -> dict[str, float]:
    """Both readings of a pair, pixel by pixel in Python floats."""
    (sw, sh), (tw, th) = record.src_size, record.trg_size
    source = polygon_mask(record.src_polygon, record.src_size).tolist()
    gt = polygon_mask(record.trg_polygon, record.trg_size).tolist()
    moved = [
        ((x * SIDE / sw + SHIFT[0]) * tw / SIDE, (y * SIDE / sh + SHIFT[1]) * th / SIDE)
        for x, y in record.src_polygon.tolist()
    ]
    inside = polygon_mask(torch.tensor(moved, dtype=torch.float64), record.trg_size).tolist()

    def source_at(column: int, row: int) -> bool:
        x = ((column + 0.5) * SIDE / tw + SHIFT[0]) * sw / SIDE - 0.5
        y = ((row + 0.5) * SIDE / th + SHIFT[1]) * sh / SIDE - 0.5
        total = 0.0
        for i in (int(y // 1), int(y // 1) + 1):
            for j in (int(x // 1), int(x // 1) + 1):
                if 0 <= i < sh and 0 <= j < sw:
                    total += source[i][j] * (1 - abs(y - i)) * (1 - abs(x - j))
        return total > 0.5

    scores = {}
    for name, pred in (("polygon", lambda c, r: inside[r][c]), ("mask", source_at)):
        votes = [(bool(pred(c, r)), gt[r][c]) for r in range(th) for c in range(tw)]
        scores[f"lt_acc_{name}"] = 100 * sum(p == g for p, g in votes) / len(votes)
        scores[f"iou_{name}"] = 100 * sum(p and g for p, g in votes) / sum(p or g for p, g in votes)
    return scores


def test_lightning_test_scores_label_transfer_in_both_readings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_caltech(tmp_path)
    model = Shifting(backbone="timm/test_vit.r160_in1k", weights="random")
    data = PairsDataModule(root=str(tmp_path), test=["caltech101"], image_size=SIDE, batch_size=2, num_workers=0)
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, accelerator="cpu", devices=1)
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[MatchImages()], **quiet)
    trainer.test(model, data, verbose=False)
    dataset = create_dataset("caltech101", tmp_path, "test")
    wanted = [by_loops(dataset.record(i)) for i in range(2)]
    means = {key: (wanted[0][key] + wanted[1][key]) / 2 for key in wanted[0]}
    result = json.loads((tmp_path / "results" / "caltech101.json").read_text())
    assert result["label_transfer"] == pytest.approx(means) and result["pairs"] == 2 and "pck" not in result
    assert 0 < result["label_transfer"]["iou_polygon"] != result["label_transfer"]["iou_mask"]
    with open(tmp_path / "results" / "caltech101.csv") as file:
        rows = list(csv.DictReader(file))
    for row, want, category in zip(rows, wanted, ("Faces", "yin_yang"), strict=True):
        assert row["category"] == category and {key: float(row[key]) for key in want} == pytest.approx(want)
        assert result["breakdown"]["category"][category] == pytest.approx({"pairs": 1} | want)
    assert model.scores == pytest.approx({f"test/{key}": value for key, value in means.items()})
    printed = capsys.readouterr().out
    assert "Label transfer on caltech101" in printed and "IoU mask" in printed and f"{means['iou_mask']:.1f}" in printed
    with pytest.raises(ZooError, match="caltech101 has no keypoints"):
        trainer.predict(model, data)
