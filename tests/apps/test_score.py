"""`corrzoo queries` and `corrzoo score`: the evaluation of matches that were made elsewhere."""

import csv
import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import fixtures
import pytest
import torch

import corrzoo
from corrzoo.__main__ import main
from corrzoo.data import DATASETS
from corrzoo.scoring.protocols import get_protocol
from pages import blocks

TINY = ["--model=Baseline", "--model.backbone=timm/test_resnet.r160_in1k", "--model.weights=random"]
TINY += [
    "--model.readout=argmax",
    "--data.image_size=64",
    "--data.num_workers=0",
    "--trainer.enable_progress_bar=false",
]
TINY += ["--data.test=[spair71k]", "--data.root=."]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixtures.write_spair(tmp_path)


def read(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def answers(protocol="default", split="test"):
    """The ground truth of every query, a list of rows."""
    dataset = corrzoo.create_dataset("spair71k", ".", split)
    side = get_protocol(protocol, dataset.threshold).evaluated
    points = [getattr(dataset.record(i), f"{side}_kps").tolist() for i in range(len(dataset))]
    return [
        {"index": i, "keypoint": k, "x": x, "y": y} for i, found in enumerate(points) for k, (x, y) in enumerate(found)
    ]


def failing(*args):
    with pytest.raises(SystemExit) as leaving:
        main(list(args))
    said = str(leaving.value.code)
    assert said.startswith("error: ") and "\n" not in said
    return said


@pytest.mark.parametrize("protocol", ["default", "cats"])
def test_queries_are_the_annotated_points(protocol):
    main(["queries", "spair71k", "--root=.", f"--protocol={protocol}", "--out=q.csv"])
    dataset, rows = corrzoo.create_dataset("spair71k", ".", "test"), read("q.csv")
    expected = []
    for i in range(len(dataset)):
        r = dataset.record(i)
        kps, paths = r.src_kps, (r.src_path, r.trg_path)
        if protocol == "cats":  # it predicts source points
            kps, paths = r.trg_kps, paths[::-1]
        for k, (x, y) in enumerate(kps.tolist()):
            expected.append([str(i), str(k), x, y, *map(str, paths), r.category, str(r.kps_ids[k].item())])
    names = ["index", "keypoint", "x", "y", "query_image", "target_image", "category", "part"]
    assert [[float(row[n]) if n in "xy" else row[n] for n in names] for row in rows] == expected


def test_scored_predictions_equal_the_test_of_the_model():
    main(["test", *TINY, "--trainer.callbacks=null"])
    main(["predict", *TINY, "--trainer.callbacks=null"])
    (tested,), (predictions,) = Path().glob("runs/*/*/results/spair71k.json"), Path().glob("runs/*/*/predictions/*.csv")
    main(["score", str(predictions), "--dataset=spair71k", "--root=.", "--out=scored"])
    scored, tested = (
        json.loads(Path("scored/spair71k-spair71k-default-bbox.json").read_text()),
        json.loads(tested.read_text()),
    )
    for name in (
        "pck",
        "breakdown",
        "pairs",
        "fingerprint",
        "measures",
        "protocol",
        "split",
        "dataset_title",
        "alphas",
    ):
        assert scored[name] == tested[name], name


def test_the_truth_is_right_under_every_protocol_of_its_image(capsys):
    write("truth.csv", answers())
    protocols = ["default", "dift:bbox", "geoaware:img", "hpf:bbox-kp"]
    main(["score", "truth.csv", "--dataset=spair71k", "--root=.", "--protocol", *protocols, "--source=a paper"])
    files = sorted(Path("results").iterdir())
    assert len(files) == 4 and capsys.readouterr().out.count("@0.1 100.0") == 4
    for file in files:
        result = json.loads(file.read_text())
        assert result["pck"]["pck@0.05"] == 100 and result["head"] == "truth" and result["source"] == "a paper"


def test_the_leaderboard_ranks_them():
    write("truth.csv", answers())
    wrong = [row | {"x": 1e6} for row in answers()]
    write("wrong.csv", wrong)
    for name, supervision in (("truth", "none"), ("wrong", "none")):
        args = [f"{name}.csv", "--dataset=spair71k", "--root=.", f"--supervision={supervision}", "--method=M " + name]
        main(["score", *args, "--source=https://example.org"])
    assert sorted(os.listdir("results")) == ["M-truth-spair71k-default-bbox.json", "M-wrong-spair71k-default-bbox.json"]
    main(["leaderboard", "results", "--out=."])
    rows = [row for row in read("leaderboard.csv") if row["measure"] == "PCK @0.1" and not row["group"]]
    found = [(row["place"], row["head"], float(row["measured"]), row["source"]) for row in rows]
    assert found == [("1", "M truth", 100.0, "https://example.org"), ("2", "M wrong", 0.0, "https://example.org")]


def test_every_query_is_answered_once():
    args = ("score", "p.csv", "--dataset=spair71k", "--root=.")
    rows = answers()
    broken = {
        "1 of .* queries have no prediction, such as pair 0, keypoint 0": rows[1:],
        "line 3: pair 0, keypoint 0 is predicted twice": [rows[0], *rows],
        "pair 99, keypoint 0 is not a query: see `corrzoo queries`": [*rows, rows[0] | {"index": 99}],
        "pair 0, keypoint 50 is not a query": [rows[0] | {"keypoint": 50}, *rows[1:]],
        "line 2: pair 0, keypoint 0: expected a finite point": [rows[0] | {"x": "nan"}, *rows[1:]],
        "line 2: expected whole numbers": [rows[0] | {"index": 0.5}, *rows[1:]],
        "lies in the src image, but the protocol evaluates the trg image": [{"image": "src"} | row for row in rows],
        "has no column 'keypoint': expected a CSV file with a header line and the columns index": [{"index": 0}],
    }
    for message, content in broken.items():
        write("p.csv", content)
        assert re.search(message, failing(*args)), message
    assert not Path("results").exists()
    write("p.csv", rows)
    said = failing(*args, "--protocol", "default", "cats")
    assert "predict in the src" in said or "predict in the trg" in said
    assert "unknown protocol" in failing(*args, "--protocol", "defalt")
    assert "no such file: q.csv" in failing("score", "q.csv", "--dataset=spair71k", "--root=.")
    assert "has no image files with keypoints: choose ap10k, cub, " in failing("queries", "synthetic")
    assert "has no split 'tets'" in failing("queries", "spair71k", "--root=.", "--split=tets")


def test_results_of_different_runs_do_not_replace_each_other():
    args = ("score", "p.csv", "--dataset=spair71k", "--root=.")
    write("p.csv", answers())
    main([*args, "--method=a b"])
    write("val.csv", answers(split="val"))
    main([args[0], "val.csv", *args[2:], "--method=a b", "--split=val"])
    main([*args, "--method=a b", "--options={layout: large}"])
    names = ["a-b-spair71k-default-bbox.json", "a-b-spair71k-large-default-bbox.json"]
    assert sorted(os.listdir("results")) == [*names, "a-b-spair71k-val-default-bbox.json"]
    before = Path("results", names[0]).read_bytes()
    said = failing(*args, "--method=a-b")
    assert f"results/{names[0]} has another result, of 'a b'" in said and "choose another --method" in said
    assert "has another result, of 'a b'" in failing(*args, "--method=a", "--label=b")
    main([*args, "--method=a b", "--source=again"])
    assert Path("results", names[0]).read_bytes() != before
    Path("results", names[0]).write_text("[]")
    assert "has another result" in failing(*args, "--method=a b")


def test_options_of_the_dataset_choose_its_pairs():
    fixtures.write_ap10k(Path("."))
    test = ["--model=Baseline", *TINY[1:-2], "--data.test=[ap10k]", "--data.root=.", "--trainer.callbacks=null"]
    test += ["--data.options={ap10k: {subset: cross-species}}"]
    main(["predict", *test])
    main(["test", *test])
    (tested,), (predictions,) = Path().glob("runs/*/*/results/ap10k.json"), Path().glob("runs/*/*/predictions/*.csv")
    args = ["--root=.", '--options={"subset": "cross-species"}']
    main(["score", str(predictions), "--dataset=ap10k", *args])
    (scored,) = Path("results").iterdir()
    scored, tested = json.loads(scored.read_text()), json.loads(tested.read_text())
    for name in ("dataset_options", "pck", "pairs", "fingerprint"):
        assert scored[name] == tested[name], name
    main(["queries", "ap10k", *args])
    (query,) = {(row["query_image"], row["category"]) for row in read("queries/ap10k-test.csv")}
    assert query[1] == "Bovidae"
    for given, message in {
        "cross-species": "--options: 'cross-species': expected a mapping",
        "{": "--options: '{': expected a mapping",
        "{1: 2}": "--options: '{1: 2}': expected a mapping",
        "{subset: cross}": "dataset 'ap10k'",
        "{subsets: cross-species}": "has no option 'subsets': did you mean 'subset'",
        "{split: val}": "--options: 'split' is no option of one dataset",
    }.items():
        assert message in failing("queries", "ap10k", "--root=.", f"--options={given}")


def test_pairs_without_keypoints_are_neither_asked_nor_scored(monkeypatch):
    spair71k = DATASETS["spair71k"]
    read_record = spair71k.record

    def record(self, i):
        found, none = read_record(self, i), torch.zeros(0, 2)
        return found if i != 1 else replace(found, src_kps=none, trg_kps=none, kps_ids=None)

    monkeypatch.setattr(spair71k, "record", record)
    main(["queries", "spair71k", "--root=.", "--out=q.csv"])
    asked = {int(row["index"]) for row in read("q.csv")}
    assert 0 in asked and 1 not in asked
    write("truth.csv", answers())
    main(["score", "truth.csv", "--dataset=spair71k", "--root=."])
    result = json.loads(Path("results/truth-spair71k-default-bbox.json").read_text())
    assert result["pairs"] == len(asked) and result["pck"]["pck@0.05"] == 100


def test_the_worked_example_of_the_docs_runs(tmp_path, capsys):
    fixtures.write_pfwillow(tmp_path / "data")
    (python,) = blocks("docs/scoring.md", "python")
    first, second = blocks("docs/scoring.md", "bash")

    def run(block):
        for line in block.splitlines():
            if not line.startswith("#"):
                name, *args = shlex.split(line)
                assert name == "corrzoo"
                main(args)

    run(first)
    exec(python, {})
    run(second)
    assert {path.name for path in Path("results").iterdir()} == {
        "same-place-pfwillow-default-bbox-kp.json", "same-place-pfwillow-hpf-bbox-kp.json"
    }  # fmt: skip
    assert "same place" in Path("board/leaderboard.html").read_text()
