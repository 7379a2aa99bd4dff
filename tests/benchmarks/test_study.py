"""The study: what is chosen and put together from runs, its budgets, its split of PF-WILLOW, and its tables."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import corrzoo  # noqa: E402
import study  # noqa: E402
import study_tables  # noqa: E402
from corrzoo.cli import main  # noqa: E402
from corrzoo.data.pairs import DATASETS  # noqa: E402
from corrzoo.data.readers.pfwillow import CATEGORIES  # noqa: E402
from corrzoo.data.synthetic.pairs import SyntheticPairs  # noqa: E402
from corrzoo.data.synthetic.warps import SyntheticWarps  # noqa: E402
from corrzoo.types import ZooError  # noqa: E402


@pytest.fixture(scope="module")
def kinds():
    """The module of PF-WILLOW's kinds, and no trace of its dataset behind it."""
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
    other = kinds.PFWillowKinds(willow, "trn", 16, kinds={"trn": ["winebottle"]})  # not what the cache has of the first
    assert shown(other) == {"winebottle"}
    for wrong in ({}, {"trn": ["boat"]}):
        with pytest.raises(ZooError, match="choose from"):
            kinds.PFWillowKinds(willow, "trn", 16, kinds=wrong)


def test_the_tested_kind_has_no_say_in_its_steps():
    few, many = map(str, study.STEPS)
    curves = {
        pair: {
            few: {kind: 50.0 for kind in study.FOLDS if kind not in pair},
            many: {kind: 99.0 if kind == "duck" else 40.0 for kind in study.FOLDS if kind not in pair},
        }
        for pair in study.combinations(study.FOLDS, 2)
    }
    assert study.best_steps(curves, "duck") == study.STEPS[0]
    assert study.best_steps(curves, "car") == study.STEPS[1]  # 99, 40, 40 on average


def test_folds_become_one_result_in_which_each_pair_counts_once():
    def fold(kind, pairs, score):
        row = {"pairs": pairs, "points": 10 * pairs, "pck@0.1/image": score, "pck@0.1/point": score}
        pck = {"pck@0.1": score, "pck@0.1/image": score, "pck@0.1/category": score}
        costs = {"ms_per_pair": score, "peak_memory_mb": pairs, "trained": {"dataset": "x", "steps": 3}}
        return {"head": "A", "pairs": pairs, "pck": pck, "breakdown": {"category": {kind: row}}} | costs

    whole = study.merged([fold("duck(S)", 90, 40.0), fold("car(G)", 270, 80.0)], {"duck": 10, "car": 20})
    assert whole["pairs"] == 360 and whole["pck"] == {"pck@0.1": 70.0, "pck@0.1/image": 70.0}
    assert whole["ms_per_pair"] is None and whole["peak_memory_mb"] == 270
    assert whole["breakdown"]["category"]["duck(S)"]["pck@0.1/image"] == 40.0
    assert whole["trained"]["steps"] == {"duck": 10, "car": 20}


@pytest.mark.parametrize("head", study.SIZES)
def test_every_head_reads_the_same_frozen_features_and_learns_as_long(head, capsys):
    for stack in (study.SIZES[head], (*study.SIZES[head], "study/efficientnet_lite2.yaml")):
        with pytest.raises(SystemExit) as leaving:
            main(["fit", *(f"--config={study.CONFIGS / item}" for item in stack), "--print_config"])
        assert leaving.value.code in (0, None)
        config = yaml.safe_load(capsys.readouterr().out)
        model, data = config["model"]["init_args"], config["data"]
        assert (model["finetune"], model["weights"], model["lr"]) == ("none", study.FEATURES, 1e-3)
        assert data["batch_size"] * config["trainer"]["max_epochs"] == 8 and data["image_size"] == 96
        assert "options" not in data or not data["options"]  # `drawings` has them


def test_nothing_learns_from_what_something_else_has_learnt_from():
    drawn = {}
    for seed in range(3):
        for learns in ("features", "head"):
            option, _, said = study.drawings(learns, seed).partition("=")
            data = json.loads(said)
            assert option == "--data.options" and data["synthetic"]["length"]["trn"] == study.PAIRS[learns]
            sets = {split: SyntheticPairs("", split, 16, **data["synthetic"]) for split in ("trn", "val", "test")} | {
                "warps": SyntheticWarps("", "trn", 16, **data["synthetic_warps"])
            }
            drawn[learns, seed] = {name: dataset[0].src_img.numpy().tobytes() for name, dataset in sets.items()}
            assert len(sets["warps"]) == study.PAIRS[learns] and len(sets["test"]) == 400
    for split in ("val", "test"):
        assert len({found[split] for found in drawn.values()}) == 1
    learnt = [found[name] for found in drawn.values() for name in ("trn", "warps")]
    assert len(set(learnt)) == len(learnt) == 12


def test_every_ablation_of_the_study_has_its_file():
    for head, names in study.ABLATIONS.items():
        assert all((study.CONFIGS / "ablation" / head / f"{name}.yaml").exists() for name in names)


def test_the_study_runs_and_does_not_run_again(tmp_path, monkeypatch, capsys):
    tiny = ("--data.image_size=64", "--data.batch_size=4", "--model.levels=[blocks.2.1]")
    short = ("--trainer.max_steps=1", "--trainer.limit_test_batches=1")
    drawn = {"test": 400, "val": 200}
    for name, value in {"RESULTS": tmp_path / "results", "RUNS": tmp_path / "runs"}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "SIZES", {"baseline": (*study.SIZES["baseline"], *tiny, *short)})
    study.synthetic([3], ["efficientnet_lite0"], ablations=False)
    first = capsys.readouterr().out
    assert "+ lightning fit --config zoo_configs/demo/baseline.yaml --config zoo_configs/study/synthetic.yaml" in first
    files = sorted((tmp_path / "results").rglob("*.json"))
    assert [path.stem for path in files] == [
        f"{name}-efficientnet_lite0-3" for name in ("baseline", "features", "imagenet")
    ]
    baseline, features, imagenet = (json.loads(path.read_text()) for path in files)
    assert {r["pairs"] for r in (baseline, features, imagenet)} == {4} and baseline["seed"] == 3
    assert baseline["trained"]["steps"] == 1 and imagenet["trained"] is None
    assert (features["weights"], baseline["weights"]) == ("pretrained", study.FEATURES)
    assert features["trained"]["options"] == {"length": {"trn": 2400, **drawn}, "seed": {"trn": 6}}
    assert baseline["trained"]["options"] == {"length": {"trn": 800, **drawn}, "seed": {"trn": 7}}
    study.synthetic([3], ["efficientnet_lite0"], ablations=False)
    assert "lightning" not in capsys.readouterr().out


def test_costs_are_measured_for_the_first_seed_and_written_for_all(tmp_path, monkeypatch):
    for name, value in {"RESULTS": tmp_path / "results", "RUNS": tmp_path / "runs"}.items():
        monkeypatch.setattr(study, name, value)
    (tmp_path / "results" / "synthetic").mkdir(parents=True)
    paths = [tmp_path / "results" / "synthetic" / f"imagenet-efficientnet_lite0-{seed}.json" for seed in range(2)]
    for path in paths:
        path.write_text('{"ms_per_pair": -1, "kept": true}')
    model = corrzoo.create_matcher("Baseline", backbone="efficientnet_lite0", weights="random", levels=["blocks.2.1"])
    asked = []
    monkeypatch.setattr(corrzoo, "load", lambda path: asked.append(path) or model)
    study.costs(rounds=1, size=2)
    assert asked == [tmp_path / "runs" / "synthetic" / "efficientnet_lite0" / "0" / "features" / "last.ckpt"]
    first, second = (json.loads(path.read_text()) for path in paths)
    assert first == second and first["kept"] and first["ms_per_pair"] > 0


def test_tables_are_means_over_seeds_and_paired_differences(tmp_path, monkeypatch):
    def result(head, label, seed, score):
        groups = {"bird": 1, "bottle": 2, "car": 3, "horse": 4}
        one = {f"pck@{a}{end}": score for a in (0.05, 0.1, 0.15) for end in ("", "/image")}
        breakdown = {"category": {g: {k: v + n for k, v in one.items()} for g, n in groups.items()}}
        breakdown |= {kind: {k: one for k in "012"} for kind in ("scale", "viewpoint")}
        said = {"head": head, "label": label, "seed": seed, "backbone": "b", "dataset": "synthetic", "split": "test"}
        return said | {"protocol": "default:bbox", "alphas": [0.05, 0.1, 0.15], "pck": one, "breakdown": breakdown}

    (tmp_path / "synthetic").mkdir()
    for seed, (whole, without) in enumerate([(50.0, 44.0), (52.0, 48.0), (54.0, 46.0)]):
        for label, score in (("", whole), ("actr_no_multi_path", without)):
            path = tmp_path / "synthetic" / f"{label}{seed}.json"
            path.write_text(json.dumps(result("ACTR", label, seed, score)))
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    assert "| b | ACTR |  | 52.0 ± 2.0 | 52.0 ± 2.0 | 52.0 ± 2.0 | 53.0 ± 2.0 |" in study_tables.heads()
    assert "multi_path" not in study_tables.heads()
    assert "| ACTR, `actr_no_multi_path` | +6.0 ± 2.0 |" in study_tables.parts()
    assert "| ACTR | 52.0 ± 2.0 / 52.0 ± 2.0 / 52.0 ± 2.0 |" in study_tables.digest()
