"""The study: its runs, recipes, learning rates, folds and tables; a small study from beginning to end."""

import argparse
import csv
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
import study_tables  # noqa: E402
from corrzoo.cli import main  # noqa: E402
from corrzoo.data import create_dataset  # noqa: E402
from corrzoo.data.pairs import DATASETS  # noqa: E402
from corrzoo.data.readers.pfwillow import CATEGORIES  # noqa: E402
from corrzoo.heads import create_matcher  # noqa: E402
from corrzoo.types import ZooError  # noqa: E402

STUDIES = list(study.DATASETS)


def arguments(name, **changed):
    given = {"seeds": [0], "heads": list(study.HEADS), "pairs": 10_000, "ablations": False, "data_root": "data"}
    return argparse.Namespace(study=name, device="cpu", jobs=1, option=[], **given | changed)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Results, runs and learning rates in an empty folder."""
    for name, value in {"RESULTS": "results", "RUNS": "runs", "RATES": "results/learning_rates.csv"}.items():
        monkeypatch.setattr(study, name, tmp_path / value)
    (tmp_path / "results").mkdir()
    return tmp_path


# ---------------------------------------------------------------- PF-WILLOW by kinds


@pytest.fixture(scope="module")
def kinds():
    """The module of PF-WILLOW's kinds, whose dataset is removed afterwards."""
    yield importlib.import_module("pfwillow_kinds")
    del sys.modules["pfwillow_kinds"], DATASETS._things["pfwillow_kinds"]


@pytest.fixture(scope="module")
def willow(tmp_path_factory):
    """A PF-WILLOW of three tiny images in each sub-class."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for category in CATEGORIES:
        folder = root / "PF-WILLOW" / category
        folder.mkdir(parents=True)
        for k in range(3):
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{k}.png")
            savemat(folder / f"{k}.mat", {"pts_coord": np.stack([rng.uniform(1, 29, 10), rng.uniform(1, 19, 10)])})
    return root


def test_a_split_has_the_pairs_of_its_kinds_alone(willow, kinds, tmp_path, monkeypatch):
    monkeypatch.setenv("CORRZOO_CACHE", str(tmp_path))

    def shown(dataset):
        return {kinds.kind_of(dataset.record(i).category) for i in range(len(dataset))}

    which = {"trn": ["car", "duck"], "val": ["motorbike"], "test": ["winebottle"]}
    splits = {split: kinds.PFWillowKinds(willow, split, 16, kinds=which, every={"val": 7}) for split in which}
    assert {split: shown(dataset) for split, dataset in splits.items()} == {k: set(v) for k, v in which.items()}
    assert {split: len(dataset) for split, dataset in splits.items()} == {"trn": 4 * 6, "val": 3 * 6, "test": 3 * 6}
    assert len(splits["val"].order()) == 3 and sorted(splits["trn"].order()) == list(range(24))
    other = create_dataset("pfwillow_kinds", willow, "trn", 16, kinds={"trn": ["winebottle"]})
    assert shown(other) == {"winebottle"}  # not what the cache has of the first
    for wrong in ({}, {"trn": ["boat"]}):
        with pytest.raises(ZooError, match="choose from"):
            kinds.PFWillowKinds(willow, "trn", 16, kinds=wrong)


def test_a_fold_does_not_train_on_what_it_tests(kinds):
    assert set(study.KINDS) == set(kinds.KINDS)
    for left_out in study.KINDS:
        options = study.Run("leave_one_out", "gsf", 0, 160, left_out=left_out).options(arguments("leave_one_out"))
        (given,) = [o.partition("=")[2] for o in options if o.startswith("--data.options=")]
        split = json.loads(given)["pfwillow_kinds"]["kinds"]
        assert split["test"] == [left_out] and split["trn"] == split["val"]
        assert {left_out, *split["trn"]} == set(study.KINDS) and left_out not in split["trn"]
        assert options.index("--plugins=pfwillow_kinds") < options.index(f"--data.options={given}")


def test_folds_become_one_result_in_which_each_pair_counts_once():
    def fold(kind, pairs, score):
        row = {"pairs": pairs, "points": 10 * pairs, "pck@0.1/image": score, "pck@0.1/point": score}
        pck = {"pck@0.1": score, "pck@0.1/image": score, "pck@0.1/category": score}
        rest = {"peak_memory_mb": pairs, "trained": {"dataset": "x", "options": kind}, "curve": {"0": {}}}
        return {"head": "A", "pairs": pairs, "pck": pck, "breakdown": {"category": {kind: row}}} | rest

    whole = study.merged([fold("duck(S)", 90, 40.0), fold("car(G)", 270, 80.0)])
    assert whole["pairs"] == 360 and whole["pck"] == {"pck@0.1": 70.0, "pck@0.1/image": 70.0}
    assert whole["peak_memory_mb"] == 270 and whole["curve"] == {} and "duck" not in str(whole["trained"])
    assert whole["breakdown"]["category"]["duck(S)"]["pck@0.1/image"] == 40.0


# ---------------------------------------------------------------- runs and recipes


def test_the_runs_of_a_study_are_seeds_by_heads_and_ablations():
    runs = study.runs_of(arguments("cub_frozen", seeds=[0, 1], heads=["baseline", "gsf"], ablations=True))
    names = [run.name for run in runs]
    assert names[:4] == ["baseline_untrained-0", "gsf_untrained-0", "baseline_untrained-1", "gsf_untrained-1"]
    assert names[4:6] == ["gsf-0", "gsf-1"]  # frozen, the Baseline has nothing to train
    assert names[6:] == [f"gsf_{part}-{seed}" for seed in (0, 1) for part in study.ABLATIONS["gsf"]]
    finetuned = study.runs_of(arguments("cub_finetuned"))
    assert [run.name for run in finetuned] == [f"{head}-0" for head in study.HEADS]  # untrained is as in cub_frozen


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("head", study.HEADS)
def test_all_heads_have_the_same_recipe(name, head, capsys):
    run = study.Run(name, head, 2, 9_600, lr=3e-3, left_out="duck" if name == "leave_one_out" else "")
    words = [f"--config={study.CONFIGS / file}" for file in run.stack()]
    options = [word for word in run.options(arguments(name)) if not word.startswith("--plugins")]
    with pytest.raises(SystemExit) as leaving:
        main(["fit", *words, *options, "--print_config"])
    assert leaving.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    model, data, trainer = config["model"]["init_args"], config["data"], config["trainer"]
    assert config["seed_everything"] == 2
    assert (model["lr"], model["backbone_lr"], model["optimizer"], model["schedule"]) == (3e-3, 3e-3, "adamw", "cosine")
    assert (model["backbone"], sorted(model["levels"])) == ("efficientnet_lite0", ["blocks.2.1", "blocks.4.2"])
    assert model["finetune"] == ("none" if name in ("cub_frozen", "leave_one_out") else "all")
    assert (data["image_size"], data["augment"]) == (96, "none")
    assert trainer["max_steps"] * data["batch_size"] == 9_600 and trainer["max_epochs"] == -1
    assert trainer["gradient_clip_val"] == 1.0 and trainer["accelerator"] == "cpu"
    warps = name == "synthetic" and head == "gsf"  # GSF learns without keypoints
    assert (
        data["train"]
        == {"synthetic": "synthetic", "leave_one_out": "pfwillow_kinds"}.get(name, "cub") + "_warps" * warps
    )


def test_every_head_matches_on_the_same_grid():
    """12 x 12 cells; LPMFlow has a second level, twice as fine as its first."""
    read = {
        h: yaml.safe_load((study.CONFIGS / f"demo/{h}.yaml").read_text())["model"]["init_args"] for h in study.HEADS
    }
    assert (read["baseline"]["stride"], read["vitsc"]["attend_at"]) == (8, "stride8")
    assert (read["actr"]["grid"], read["gsf"]["grid"], 2 * read["lpmflow"]["grid"]) == (12, 12, 12)


@pytest.mark.parametrize("head", study.SIZES)
def test_heads_of_other_demo_sizes_match_on_the_grid_of_the_study(head):
    """The answer of TransforMatcher has twice as many cells a side as its matches, in the paper as well."""
    options = yaml.safe_load((study.CONFIGS / f"demo/{head}.yaml").read_text())["model"]
    name, given = options["class_path"], options["init_args"]
    for option in study.SIZES[head]:
        key, _, value = option.removeprefix("--model.").partition("=")
        given[key] = yaml.safe_load(value)
    model = create_matcher(name, **given | {"weights": "random"}).eval()
    with torch.no_grad():
        flow = model(*torch.zeros(2, 1, 3, 96, 96).unbind()).flow
    cells = 24 if head == "transformatcher" else 12
    assert flow.shape == (1, 2, cells, cells) and getattr(model, "grid", 12) in (12, (12, 12))


def test_every_ablation_and_zero_shot_run_has_its_files():
    for head, names in study.ABLATIONS.items():
        assert all((study.CONFIGS / "ablation" / head / f"{name}.yaml").exists() for name in names)
    for _, stack, _ in study.ZERO_SHOT.values():
        assert all((study.CONFIGS / name).exists() for name in stack)


def test_zero_shot_runs_what_has_no_result(folders, monkeypatch):
    ran = []

    def test(folder, label, stack, options):
        ran.append((f"{folder.parent.name}/{folder.name}", label))
        yield "pfwillow", {"pck": dict.fromkeys(("pck@0.05", "pck@0.1", "pck@0.15"), 1.0), "label": label}

    monkeypatch.setattr(study, "test", test)
    path = folders / "results" / "pfwillow" / "same-position.json"
    path.parent.mkdir()
    path.write_text("{}")
    study.zero_shot(arguments("zero_shot"))
    assert path.read_text() == "{}" and "pfwillow/same-position" not in dict(ran)
    assert len(ran) == len(study.ZERO_SHOT) - 1 and ("pfwillow/mutual-lite2", "mutual nearest neighbours") in ran
    assert (folders / "results" / "cub" / "mirrorguided-lite0.json").exists()
    study.zero_shot(arguments("zero_shot"))
    assert len(ran) == len(study.ZERO_SHOT) - 1


# ---------------------------------------------------------------- learning rates


def test_the_learning_rate_is_the_best_on_validation_pairs(folders):
    run = study.Run("cub_frozen", "actr", 1, 10_000, "no_multi_path")
    scored = {3e-4: 20.0, 1e-3: 31.5, 3e-3: 8.0}
    with pytest.raises(RuntimeError, match=r"cub_frozen, actr: learning rates \[0.0003, 0.001, 0.003\] were not tried"):
        study.learning_rate(run)
    with study.RATES.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["study", "head", "lr", "pairs", "pck@0.1"])
        writer.writeheader()
        for lr, score in scored.items():
            same = {"head": "actr", "lr": lr, "pairs": 1200}
            writer.writerow(same | {"study": "cub_frozen", "pck@0.1": score})
            writer.writerow(same | {"study": "synthetic", "pck@0.1": 50 - score})
    assert study.learning_rate(run) == study.learning_rate(replace(run, study="leave_one_out")) == 1e-3
    with pytest.raises(RuntimeError, match="were not tried"):  # for so many pairs
        study.learning_rate(replace(run, pairs=20_000))
    assert (
        "| photographs (CUB), frozen features | ACTR |  | 20.0 | **31.5** | 8.0 |  |  |  |  |" in study_tables.rates()
    )


@pytest.mark.parametrize(
    ("scored", "next_rates"),
    [
        ({}, [3e-4, 1e-3, 3e-3]),
        ({3e-4: 1.0, 1e-3: 2.0, 3e-3: 1.0}, []),
        ({3e-4: 1.0, 1e-3: 2.0, 3e-3: 3.0}, [1e-2]),
        ({3e-4: 1.0, 1e-3: 2.0, 3e-3: 3.0, 1e-2: 4.0}, [3e-2]),
        ({3e-4: 1.0, 1e-3: 2.0, 3e-3: 3.0, 1e-2: 4.0, 3e-2: 5.0, 1e-1: 6.0, 3e-1: 7.0}, []),  # the largest of all
        ({3e-4: 3.0, 1e-3: 2.0, 3e-3: 1.0}, [1e-4]),
    ],
)
def test_rates_are_tried_until_the_best_lies_between_two_others(monkeypatch, scored, next_rates):
    monkeypatch.setattr(study, "tried_rates", lambda run: scored)
    assert study.untried(study.Run("cub_frozen", "actr", 0, 10_000)) == next_rates


def test_results_of_another_number_of_pairs_have_a_folder_of_their_own():
    run = study.Run("cub_frozen", "actr", 0, study.PAIRS)
    folders = {pairs: replace(run, pairs=pairs).result.parent.name for pairs in (0, 2000, study.PAIRS)}
    assert folders == {0: "cub_frozen", 2000: "cub_frozen_2000", study.PAIRS: "cub_frozen"}


def test_a_result_of_another_learning_rate_is_trained_again(folders, monkeypatch):
    run, pck = study.Run("cub_frozen", "actr", 0, 10_000), {f"pck@{alpha}": 1.0 for alpha in (0.05, 0.1, 0.15)}
    study.write(run.result, {"pck": pck, "options": {"lr": 1e-3}})
    monkeypatch.setattr(study, "tried_rates", lambda run: {3e-4: 1.0, 1e-3: 2.0, 3e-3: 1.0})
    assert study.finished(run)
    monkeypatch.setattr(study, "tried_rates", lambda run: {3e-4: 1.0, 1e-3: 2.0, 3e-3: 3.0, 1e-2: 1.0})
    assert not study.finished(run)


# ---------------------------------------------------------------- from beginning to end


def test_a_small_study_runs_is_resumed_and_does_not_run_again(folders, monkeypatch, capfd):
    lengths = json.dumps({"synthetic": {"length": {"trn": 64, "val": 4, "test": 5}}})
    few = [f"--data.options={lengths}", "--data.image_size=64", "--checkpoint.last_every_n_steps=1"]
    whole = study.Run.options
    monkeypatch.setattr(study.Run, "options", lambda run, args: [*whole(run, args), *few])
    monkeypatch.setattr(study, "MARKS", (0, 16, 10_000))
    monkeypatch.setattr(study, "LEARNING_RATES", (1e-3,))
    monkeypatch.setattr(study, "TRIED_FIRST", (1e-3,))
    monkeypatch.setattr(study, "SWEEP", 0.5)
    args = arguments("synthetic", seeds=[3], heads=["baseline"], pairs=32)

    study.study(args)
    said = capfd.readouterr().out
    assert said.count("+ lightning fit") == 2 and said.count("+ lightning test") == 2
    assert "--config zoo_configs/demo/baseline.yaml --config zoo_configs/study/recipe.yaml" in said
    untrained, trained = (
        json.loads((study.RESULTS / f"{n}-3.json").read_text())
        for n in ("synthetic/baseline_untrained", "synthetic_32/baseline")
    )
    assert (untrained["label"], untrained["trained"], untrained["curve"]) == ("untrained", None, {})
    assert (trained["label"], trained["seed"], trained["pairs"], trained["precision"]) == ("", 3, 5, "32-true")
    assert trained["trained"]["pairs_seen"] == 32 and trained["trained"]["steps"] == 2
    assert list(trained["curve"]) == ["0", "16", "32"]
    (row,) = study.rates()
    assert (row["study"], row["head"], row["lr"], row["pairs"]) == ("synthetic", "baseline", "0.001", "16")

    study.study(args)
    assert "lightning" not in capfd.readouterr().out

    (study.RESULTS / "synthetic_32/baseline-3.json").unlink()  # interrupted after training, before the test
    study.study(args)
    said = capfd.readouterr().out
    assert said.count("+ lightning test") == 1 and "+ lightning fit" not in said

    (study.RESULTS / "synthetic_32/baseline-3.json").unlink()  # interrupted before the last score of the curve
    path = study.RUNS / "synthetic" / "baseline-3_lr0.001_pairs32" / "curve.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "32"}))
    path.with_name("ended").unlink()
    study.study(args)
    assert f"--ckpt_path={path.with_name('last.ckpt')}" in capfd.readouterr().out


def test_a_failed_run_is_an_error_that_names_its_log(folders):
    with pytest.raises(RuntimeError, match=r"failed: see .*log"):
        study.lightning(folders / "broken", "fit", ["demo/baseline.yaml"], ["--data.image_size=nothing"])
    assert "image_size" in (folders / "broken" / "log").read_text()


# ---------------------------------------------------------------- tables and picture


def put(folder, name, run, score, curve=None):
    """Write a result with one score everywhere, 10 points more for ducks."""
    row = {"pairs": 2, "pck@0.1/image": score}
    category = {"duck(S)": row | {"pck@0.1/image": score + 10}, "car(G)": row}
    pck = {f"pck@{alpha}": score for alpha in (0.05, 0.1, 0.15)}
    result = {"pck": pck, "breakdown": {"category": category}}
    found = {seen: {"pck@0.1": value} for seen, value in (curve or {}).items()}
    path = folder / "results" / name / f"{run}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result | {"curve": found}))


def test_tables_are_means_over_seeds_and_say_what_is_missing(folders):
    put(folders, "cub_frozen", "actr_untrained-0", 2.0)
    for seed, (whole, without) in enumerate([(50.0, 44.0), (52.0, 48.0), (54.0, 46.0)]):
        put(folders, "cub_frozen", f"actr-{seed}", whole, {0: 2.0, 800: 10.0 + seed, 2496: 20.0})
        put(folders, "cub_frozen", f"actr_no_multi_path-{seed}", without)
    actr = "| ACTR | keypoints | 2.0 / 2.0 / 2.0 | 52.0 ± 2.0 / 52.0 ± 2.0 / 52.0 ± 2.0 | not run yet |"
    assert actr in study_tables.photographs()
    assert "| ViTSC | keypoints | not run yet | not run yet | not run yet |" in study_tables.photographs()
    assert "| Baseline | keypoints | not run yet | nothing to train | not run yet |" in study_tables.photographs()
    assert "| ACTR | `no_multi_path` | +6.0 ± 2.0 | +6.0 ± 2.0 | +6.0 ± 2.0 |" in study_tables.parts()
    assert "| ViTSC | `table4_none` | not run yet |" in study_tables.parts()
    assert "| photographs (CUB), frozen features | ACTR | 2.0 | 11.0 | 20.0 |  |" in study_tables.curves()
    (frozen,) = [line for line in study_tables.missing().splitlines() if "frozen" in line]
    assert "| 4 of 46 |" in frozen and "`vitsc` (0, 1, 2)" in frozen and "`actr_no_reweighting` (0)" in frozen
    assert "`actr` " not in frozen and "`actr_no_multi_path`" not in frozen


def test_transfer_and_left_out_kinds_are_read_by_kind(folders):
    put(folders, "cub_frozen_pfwillow", "gsf_untrained-0", 40.0)
    put(folders, "cub_finetuned_pfwillow", "gsf-0", 30.0)
    (gsf,) = [line for line in study_tables.transfer().splitlines() if "GSF" in line]
    missing = study_tables.MISSING
    values = ["40.0 / 40.0 / 40.0", missing, "30.0 / 30.0 / 30.0", "50.0", missing, "40.0"]
    assert gsf == f"| GSF | {' | '.join(values)} |"
    put(folders, "leave_one_out", "gsf-0", 20.0)
    for path in (folders / "results").glob("*/gsf*-0.json"):
        result = json.loads(path.read_text())
        row = result["breakdown"]["category"]["car(G)"]
        result["breakdown"]["category"] |= {"motorbike(M)": row, "winebottle(M)": row}
        path.write_text(json.dumps(result))
    assert "| untrained | 40.0 / 40.0 / 40.0 | 40.0 | 50.0 | 40.0 | 40.0 |" in study_tables.left_out()
    assert "| trained | 20.0 / 20.0 / 20.0 | 20.0 | 30.0 | 20.0 | 20.0 |" in study_tables.left_out()


def test_the_picture_has_the_curves_of_the_results(folders):
    matplotlib.use("Agg")
    put(folders, "cub_frozen", "actr-0", 50.0, {0: 2.0, 800: 10.0, 10_000: 50.0})
    put(folders, "cub_finetuned", "baseline-0", 60.0, {0: 32.0, 10_000: 60.0})
    frozen, finetuned = study_tables.picture().axes
    assert frozen.get_xscale() == "log" and frozen.get_title() == study_tables.TITLES["cub_frozen"]
    lines = {line.get_label(): line for line in frozen.lines}
    assert lines["ACTR"].get_xdata().tolist() == [400, 800, 10_000]  # 0 is drawn at 400
    assert lines["ACTR"].get_ydata().tolist() == [2.0, 10.0, 50.0]
    assert set(lines["Baseline"].get_ydata()) == {32.0}  # untrained
    (baseline,) = finetuned.lines
    assert baseline.get_ydata().tolist() == [32.0, 60.0]
