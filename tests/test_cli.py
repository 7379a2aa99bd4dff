"""The command line, mostly in this process."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import corrzoo
from corrzoo.callbacks import PICTURES
from corrzoo.cli import main
from corrzoo.scoring.evaluation import Evaluation

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "zoo_configs"
HEAD_CONFIGS = sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "demo.yaml")
VIT = "timm/test_vit.r160_in1k"
TINY = [
    f"--model.backbone={VIT}",
    "--model.weights=random",
    "--model.levels=null",
    "--data.image_size=64",
    "--data.num_workers=0",
    "--data.batch_size=4",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FEW = ['--data.options={"synthetic": {"length": {"trn": 8, "val": 5, "test": 7}}}']
DEMO = [f"--config={CONFIGS / 'demo.yaml'}"]
BASELINE = [f"--config={CONFIGS / 'baseline.yaml'}"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failing(capsys, *args):
    """One-line error of a failing command."""
    with pytest.raises(SystemExit) as leaving:
        main(list(args))
    assert leaving.value.code not in (0, None)
    said = leaving.value.code if isinstance(leaving.value.code, str) else capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    return said


@pytest.mark.parametrize("config", HEAD_CONFIGS, ids=lambda p: p.stem)
def test_every_head_config_trains_on_synthetic_pairs(config, tmp_path):
    main(["fit", f"--config={config}", *DEMO, *TINY, *FEW, "--trainer.fast_dev_run=true"])


@pytest.mark.parametrize("head", corrzoo.list_heads())
def test_the_demo_of_every_head_stands_alone(head, capsys):
    few = ['--data.options={"synthetic": {"length": {"trn": 16, "val": 2}}, "synthetic_warps": {"length": 16}}']
    main(["fit", f"--config=demo/{head.lower()}", *few, "--model.weights=random", "--trainer.fast_dev_run=true"])
    assert f"{head} on efficientnet_lite0" in capsys.readouterr().out


def test_the_demo_of_the_baseline_is_the_first_line_of_the_readme(capsys):
    printed = []
    for args in ([*BASELINE, *DEMO], ["--config=demo/baseline"]):
        with pytest.raises(SystemExit):
            main(["fit", *args, "--print_config"])
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0]["model"]["init_args"].pop("backbone_size") == 128 == printed[0]["data"]["image_size"]
    assert printed[1]["model"]["init_args"].pop("backbone_size") is None
    assert printed[0] == printed[1]


ABLATIONS = sorted(CONFIGS.glob("ablation/*/*.yaml"))
STACKED = [p for folder in ("backbone", "data", "trainer") for p in sorted((CONFIGS / folder).glob("*.yaml"))]
STACKED += [*ABLATIONS, *sorted((CONFIGS / "study").glob("*.yaml"))]


def label(path):
    return str(path.relative_to(CONFIGS).with_suffix(""))


def base_of(config):
    """Recipe that a file is merged into."""
    return "demo/baseline" if config.parent.name == "study" else recipe_of(config)


def recipe_of(config):
    if config in ABLATIONS:
        return config.parent.name
    head = config.stem.partition("_")[0]  # data/gsf_pfpascal is for GSF alone
    return head if (CONFIGS / f"{head}.yaml").is_file() else "baseline"


@pytest.mark.parametrize("config", STACKED, ids=label)
def test_every_stacked_config_parses(config, capsys, monkeypatch):
    with pytest.raises(SystemExit) as leaving:
        main(["fit", f"--config={base_of(config)}", f"--config={config}", "--print_config"])
    assert leaving.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    for key, value in _leaves(yaml.safe_load(config.read_text())):
        node = printed
        for part in key:
            node = node[part]
        if key[-1] != "class_path":
            assert node == value, key


@pytest.mark.parametrize("config", ABLATIONS, ids=label)
def test_an_ablation_alone_names_the_recipe_that_comes_first(config, capsys):
    said = failing(capsys, "fit", f"--config={config}", "--print_config")
    assert f"no head: put --config zoo_configs/{config.parent.name}.yaml (or --model <head>) before it" in said


OF_A_HEAD = [p for p in STACKED if p.parent.name in ("backbone", "study") and "model:" in p.read_text()]


@pytest.mark.parametrize("config", OF_A_HEAD, ids=label)
def test_options_of_a_head_alone_ask_for_a_recipe(config, capsys):
    assert "put --config zoo_configs/<head>.yaml (or --model <head>) before it" in failing(
        capsys, "fit", f"--config={config}", "--print_config"
    )


def test_a_file_does_not_silently_change_the_head(capsys):
    said = failing(capsys, "fit", "--config=baseline", "--config=demo/lpmflow", "--print_config")
    assert said.startswith("error: demo/lpmflow changes the head from Baseline to LPMFlow: leave it out")
    assert "from ViTSC to Baseline" in failing(capsys, "fit", "--model=ViTSC", "--config=baseline", "--print_config")
    for args in (
        ["--config=vitsc", "--config=demo/vitsc"],
        ["--config=baseline", "--config=demo/vitsc", "--model=ViTSC"],
    ):
        with pytest.raises(SystemExit) as leaving:
            main(["fit", *args, "--print_config"])
        assert leaving.value.code in (0, None)
        assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "corrzoo.heads.ViTSC"


@pytest.mark.parametrize("name", ["lpmflow", "lpmflow.yaml", "zoo_configs/lpmflow.yaml", "zoo_configs/lpmflow"])
@pytest.mark.parametrize("option", ["--config=", "--config", "-c"])
def test_recipes_are_found_from_any_folder(name, option, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *([option + name] if option.endswith("=") else [option, name]), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "corrzoo.heads.LPMFlow"


def test_a_local_file_comes_before_a_recipe(tmp_path, capsys):
    Path("lpmflow.yaml").write_text("model: {class_path: ACTR}\n")
    Path("gsf").mkdir()  # no file
    for name, head in {"lpmflow.yaml": "ACTR", "lpmflow": "LPMFlow", "gsf": "GSF"}.items():
        with pytest.raises(SystemExit):
            main(["fit", f"--config={name}", "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == f"corrzoo.heads.{head}"


def test_a_configuration_is_text_of_any_length(capsys):
    text = yaml.safe_dump({"model": {"class_path": "ACTR"}}, default_flow_style=True).strip() + " # " + 500 * "long "
    with pytest.raises(SystemExit):
        main(["fit", f"--config={text}", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "corrzoo.heads.ACTR"


def _leaves(node, path=()):
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, node


def test_fit_validate_test_predict_and_reload(tmp_path, capsys):
    main(["fit", *BASELINE, *DEMO, *TINY, *FEW])
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and "val/pck@0.1" in printed
    (run,) = (tmp_path / "runs").glob("*/version_0")
    assert (run / "matches-fit.png").stat().st_size > 10_000
    checkpoint = run / "checkpoints" / "best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    assert content["head"] == "Baseline"

    # the saved configuration can be run again
    saved = [f"--config={run / 'config.yaml'}"]
    main(["validate", *saved, f"--ckpt_path={checkpoint}"])
    main(["test", *saved, f"--ckpt_path={checkpoint}"])
    assert len(list(tmp_path.glob("runs/*/*/checkpoints/*"))) == 2  # evaluation writes no checkpoints
    result = json.loads(next(tmp_path.glob("runs/*/version_*/results/synthetic.json")).read_text())
    assert result["head"] == "Baseline" and result["pairs"] == 7 and result["protocol"] == "default:bbox"
    assert result["trained"] == {
        **{
            "dataset": "synthetic",
            "options": {"length": {"trn": 8, "val": 5, "test": 7}},
            "augment": "none",
            "size": 64,
        },
        **{"batch_size": 4, "max_epochs": 1, "max_steps": -1, "steps": 2, "pairs_seen": 8, "seed": 0},
    }
    assert result["seed"] == 0 and result["label"] == "" and result["dataset_options"] == result["trained"]["options"]
    assert result["checkpoint_sha256"] and result["params_head"] == 1 and result["backend"] == "torch"
    with next(tmp_path.glob("runs/*/version_*/results/synthetic.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(7))
    mean = sum(float(row["pck@0.1"]) for row in rows) / 7
    assert result["pck"]["pck@0.1"] == pytest.approx(mean)

    main(["predict", *saved, f"--ckpt_path={checkpoint}"])
    predictions = next(tmp_path.glob("runs/*/version_*/predictions/synthetic.csv"))
    with predictions.open() as file:
        assert len(list(csv.DictReader(file))) == sum(int(row["points"]) for row in rows)
    # the configuration's MatchImages, which draws matches only, replaces the default one
    assert [p.name for p in predictions.parents[1].glob("*.png")] == ["matches-predict.png"]

    assert {p.parent.name for p in tmp_path.glob("runs/*/*/config.yaml")} == {
        *("version_0", "version_0-validate", "version_0-test", "version_0-predict")
    }  # beside the results

    # the same weights and training data in Python
    model = corrzoo.load(checkpoint)
    assert model.image_size == 64 and model.trained == result["trained"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, content["state_dict"][name])


def test_predict_draws_every_picture(tmp_path, capsys):
    args = ["predict", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null", "--data.test=[synthetic]"]
    main(args)
    (folder,) = tmp_path.glob("runs/*/predict")
    assert {p.name for p in folder.glob("*.png")} == {f"{kind}-predict.png" for kind in PICTURES}
    main([*args, "--model.backbone=timm/test_resnet.r160_in1k"])
    (folder,) = tmp_path.glob("runs/*resnet*/predict")
    assert len(list(folder.glob("*.png"))) == len(PICTURES) - 1
    assert "foreground: not drawn, timm/test_resnet.r160_in1k has no class token" in capsys.readouterr().out


def test_pictures_during_training_and_a_custom_result_folder(tmp_path):
    pictures = {"kinds": ["matches", "heat"], "pairs": 2, "every": 1, "stages": []}
    callbacks = [
        {"class_path": "corrzoo.callbacks.MatchImages", "init_args": pictures},
        {"class_path": "corrzoo.callbacks.ResultsWriter", "init_args": {"folder": "mine", "label": "toy"}},
    ]
    args = [*BASELINE, *DEMO, *TINY, *FEW, f"--trainer.callbacks={json.dumps(callbacks)}"]
    main(["fit", *args, "--trainer.max_epochs=2", f"--config={CONFIGS / 'trainer' / 'tensorboard.yaml'}"])
    (folder,) = tmp_path.glob("runs/*/version_0")
    assert {p.name for p in folder.glob("*.png")} == {f"{k}-val-{s}.png" for k in ("matches", "heat") for s in (2, 4)}
    board = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in board.Images("heat/val")] == [2, 4]
    main(["test", *args])
    assert json.loads(Path("mine/synthetic.json").read_text())["label"] == "toy"


def test_a_checkpoint_must_not_silently_replace_the_model(tmp_path, capsys):
    main(["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.limit_train_batches=1", "--trainer.callbacks=null"])
    (checkpoint,) = tmp_path.glob("runs/*/version_0/checkpoints/best.ckpt")
    said = failing(capsys, "test", *BASELINE, *DEMO, *TINY, *FEW, "--model.stride=4", f"--ckpt_path={checkpoint}")
    assert "stride=8" in said and "4" in said
    # options of evaluation may differ
    args = ["--model=Baseline", "--model.readout=argmax", *TINY, *FEW, "--data.test=[synthetic]"]
    main(["test", *args, f"--ckpt_path={checkpoint}"])
    results = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/version_*/results/synthetic.json")]
    assert results[-1]["options"]["readout"] == "argmax"


def test_a_checkpoint_has_its_weights_and_their_origin(tmp_path):
    main(["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.limit_train_batches=1", "--trainer.callbacks=null"])
    (checkpoint,) = tmp_path.glob("runs/*/version_0/checkpoints/best.ckpt")
    # no pretrained weights are needed; of the model, its name is enough
    for args in ([*BASELINE, *DEMO, *TINY, "--model.weights=pretrained"], ["--model=Baseline", "--data.image_size=64"]):
        main(["test", *args, *FEW, "--data.test=[synthetic]", f"--ckpt_path={checkpoint}"])
    results = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("runs/*/version_*/results/synthetic.json"))]
    assert [result["weights"] for result in results] == ["random", "random"]
    assert results[0]["pck"] == results[1]["pck"]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["fit", "--model=Basline"], "did you mean 'Baseline'"),
        (["fot"], "did you mean 'fit'"),
        (["fit", *BASELINE, "--model.strde=4"], "did you mean 'stride'"),
        (["fit", *BASELINE, "--model.backbone=dinov2_b"], "did you mean 'dinov2_b14'"),
        (["fit", *BASELINE, "--data.trian=synthetic"], "did you mean '--data.train'"),
        (["fit", *BASELINE, "--data.train=spair"], "did you mean 'spair71k'"),
        (["fit", *BASELINE, "--trainer.max_epoch=1"], "did you mean '--trainer.max_epochs'"),
        (["fit", "--config=zoo_configs/basline.yaml"], "did you mean 'zoo_configs/baseline.yaml'"),
        (["fit", "--config=baselin.yaml"], "did you mean 'baseline.yaml'"),
        (["fit", "--config=lpmflow.yml"], "did you mean 'lpmflow.yaml'"),
        (["fit", "--config=ablation/lpmflow_no_larl.yaml"], "did you mean 'ablation/lpmflow/no_larl.yaml'"),
        (["fit", *BASELINE, "--model.lr=abc"], "model.lr 'abc': expected a number"),
        (["fit", *BASELINE, "--model.finetune=some"], "model.finetune 'some': expected a whole number or all, none"),
        (["fit", *BASELINE, "--data.image_size=9.5"], "data.image_size '9.5': expected a whole number or a list"),
        (["fit", *BASELINE, "--trainer.max_epochs=x"], "trainer.max_epochs 'x': expected a whole number or null"),
        (["fit", "--model.help=Baselin"], "unknown head 'Baselin': did you mean 'Baseline'"),
        (["fit", "--model.lr=1"], "put --config zoo_configs/<head>.yaml (or --model <head>) before it"),
        (["test", *BASELINE, "--model.alphas=[-1]"], "alphas [-1.0]"),
        (["fit", *BASELINE, "--model.protocol=nowhere"], "unknown protocol 'nowhere'"),
        (["fit", *BASELINE, "--model.stride=0"], "stride 0: expected a number above 0"),
        (["test", *BASELINE, "--data.test=[pfwillow,pfwillow]"], "names pfwillow more than once"),
        (["fit"], "no head given"),
        (["fit", *BASELINE, "--trainer.strategy=dpp"], "invalid strategy name: `strategy='dpp'`"),
        (["fit", *BASELINE, *DEMO, *TINY, "--model.alphas=[0.05]"], "--checkpoint.monitor one of ['val/pck@0.05']"),
        (["fit", *DEMO, *BASELINE], "put --config zoo_configs/<head>.yaml (or --model <head>) before it"),
        (["test", *BASELINE, *DEMO, *TINY, "--ckpt_path=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["test", *BASELINE, *DEMO, *TINY, "--model.protocol=cat"], "did you mean 'cats'"),
        (["fit", *BASELINE, "--data.root=nowhere", "--data.download=false", *TINY], "nowhere/SPair-71k"),
    ],
)
def test_errors_are_one_line_with_a_remedy(args, expected, capsys):
    assert expected in failing(capsys, *args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_a_one_line_error(capsys):
    assert "gpu" in failing(capsys, "fit", *BASELINE, *DEMO, *TINY, "--trainer.accelerator=gpu")


def test_a_pickled_checkpoint_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path("owned").touch, ())

    torch.save({"state_dict": Evil()}, "evil.ckpt")
    said = failing(capsys, "test", *BASELINE, *DEMO, *TINY, "--ckpt_path=evil.ckpt")
    assert "refused" in said and not Path("owned").exists()


def test_an_unwritable_folder_is_reported_before_evaluation(tmp_path, capsys):
    Path("file").touch()
    said = failing(capsys, "test", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.logger.init_args.save_dir=file")
    assert "file" in said


def test_last_is_the_newest_checkpoint(tmp_path, capsys):
    args = ["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null"]
    said = failing(capsys, *args, "--ckpt_path=last")
    assert f"no last.ckpt of Baseline on {VIT} found under runs: give --ckpt_path a file" in said
    main(args)
    main([*args, "--ckpt_path=last", "--trainer.max_epochs=2"])
    paths = sorted(tmp_path.glob("runs/*/*/checkpoints/last.ckpt"))
    assert [torch.load(p, weights_only=True)["global_step"] for p in paths] == [2, 4]


def test_a_training_begins_with_the_weights_of_another(tmp_path, capsys):
    """A second stage: other options, a new optimiser, and epochs from 0."""
    args = ["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null"]
    main(args)
    (first,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    still = ["--model.lr=0", "--model.backbone_lr=0", "--model.schedule=cosine"]
    main([*args, *still, f"--init_from={first}"])
    (second,) = set(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")) - {first}
    old, new = (torch.load(path, weights_only=True) for path in (first, second))
    assert all(torch.equal(value, new["state_dict"][name]) for name, value in old["state_dict"].items())
    assert new["global_step"] == old["global_step"] == 2
    assert new["trained"]["before"] == "synthetic" and "before" not in old["trained"]
    said = failing(
        capsys, *args, f"--init_from={first}", "--model.learn_temperature=false", "--model.levels=[1]", "--model=ACTR"
    )
    assert f"{first}, Baseline on {VIT}, does not fit this model" in said
    again = [f"--config={second.parents[1] / 'config.yaml'}", "--trainer.callbacks=null", f"--ckpt_path={second}"]
    first.unlink()  # neither a resumed run nor an evaluation reads it
    main(["fit", *again, "--trainer.max_epochs=2"])
    main(["test", *again])
    (third,) = set(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")) - {second}
    assert torch.load(third, weights_only=True)["trained"]["before"] == "synthetic"


def test_resuming_a_finished_run_says_so(tmp_path, capsys):
    args = ["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null"]
    main(args)
    for limit, value in {"max_epochs": 1, "max_steps": 2}.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([*args, "--ckpt_path=last", f"--trainer.{limit}={value}"])
        assert leaving.value.code == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith(f"last.ckpt has already reached {limit}={value}: give a larger --trainer.{limit}")
        args += ["--trainer.max_epochs=9"]
    assert len(list(tmp_path.glob("runs/*/*"))) == 1


def test_several_best_checkpoints_need_a_filename_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Evaluation, "scores", lambda self, stage: {"val/pck@0.1": -float(next(epochs))})
    epochs = iter(range(3))  # the first epoch is the best
    args = ["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null", "--trainer.max_epochs=3"]
    args += ["--trainer.num_sanity_val_steps=0", "--checkpoint.dirpath=kept"]
    said = failing(capsys, *args, "--checkpoint.save_top_k=-1")
    told = "save_top_k=-1 would write every checkpoint to best.ckpt: give --checkpoint.filename "
    assert told + "'best-{epoch}-{step}'" in said
    main([*args, "--checkpoint.save_top_k=2", "--checkpoint.filename=best-{epoch}-{step}"])
    names = {"best-epoch=0-step=2.ckpt", "best-epoch=1-step=4.ckpt", "last.ckpt"}
    assert {path.name for path in (tmp_path / "kept").iterdir()} == names
    said = failing(capsys, "test", *BASELINE, *DEMO, *TINY, *FEW, "--checkpoint.dirpath=kept", "--ckpt_path=best")
    assert f"no best.ckpt of Baseline on {VIT} found under kept: give --ckpt_path a file" in said


def test_best_is_the_newest_of_the_same_head_and_backbone(tmp_path, capsys):
    short = [*TINY, *FEW, "--trainer.callbacks=null", "--trainer.limit_train_batches=1"]
    demo, resnet = ["--config=baseline", *DEMO, *short], "timm/test_resnet.r160_in1k"
    main(["fit", *demo])
    main(["fit", *demo, f"--model.backbone={resnet}"])
    main(["fit", "--config=demo/actr", *short, "--model.grid=8"])

    def tested(*args):
        known = set(tmp_path.glob("runs/*/*/results/synthetic.json"))
        main(["test", *args, "--ckpt_path=best"])
        (new,) = set(tmp_path.glob("runs/*/*/results/synthetic.json")) - known
        result = json.loads(new.read_text())
        return new.parents[1].name, result["head"], result["backbone"]

    assert tested(*demo) == ("version_0-test", "Baseline", VIT)
    assert tested(*demo) == ("version_0-test-2", "Baseline", VIT)
    assert tested(*demo, f"--model.backbone={resnet}") == ("version_0-test", "Baseline", resnet)
    anyone = ["--model=Baseline", "--data.image_size=64", "--data.num_workers=0", *FEW, "--data.test=[synthetic]"]
    assert tested(*anyone) == ("version_0-test-2", "Baseline", resnet)  # the newer of the two
    said = failing(capsys, "test", "--config=vitsc", *DEMO, *short, "--ckpt_path=best")
    others = f"only of ACTR on {VIT}, Baseline on {resnet}, Baseline on {VIT}"
    assert f"no best.ckpt of ViTSC on {VIT} found under runs ({others}): give --ckpt_path a file" in said


def test_runs_without_a_logger_write_into_runs(tmp_path):
    Path("config.yaml").write_text("mine")
    few = [*BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null", "--trainer.limit_train_batches=1"]
    main(["fit", *few, "--trainer.logger=false"])
    for _ in range(2):
        main(["test", *few, "--trainer.logger=false", "--ckpt_path=last"])
    assert Path("config.yaml").read_text() == "mine" and {p.name for p in tmp_path.iterdir()} <= {"config.yaml", "runs"}
    (runs,) = tmp_path.glob("runs/*")
    assert {p.name for p in runs.iterdir()} == {"fit", "fit-test", "fit-test-2"}
    assert {p.name for p in (runs / "fit-test").iterdir()} >= {"config.yaml", "results"}
    assert (runs / "fit" / "checkpoints" / "best.ckpt").is_file()


def test_a_run_of_one_batch_writes_no_results(tmp_path, capsys):
    for command in ("test", "predict"):
        main([command, *BASELINE, *DEMO, *TINY, *FEW, "--trainer.fast_dev_run=1"])
    assert [p.name for p in tmp_path.iterdir()] == ["runs"] and "PCK on synthetic" in capsys.readouterr().out
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".json", ".csv", ".yaml")]


def test_two_processes_write_the_same_results_as_one(tmp_path):
    args = ["test", *BASELINE, *DEMO, *TINY, *FEW]
    main([*args, "--trainer.logger.save_dir=one"])
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger.save_dir=two"]
    # the timeout ends a process that waits for the other forever
    subprocess.run([sys.executable, "-m", "corrzoo", *args, *two], check=True, capture_output=True, timeout=600)
    (one,), (other,) = (list(tmp_path.glob(f"{run}/*/*/results/synthetic.csv")) for run in ("one", "two"))
    assert one.read_text() == other.read_text()
    assert json.loads(other.with_suffix(".json").read_text())["processes"] == 2
    assert list(tmp_path.glob("two/*/*/matches-test.png"))


def test_a_first_run_prints_nothing_that_a_user_cannot_act_on(tmp_path):
    args = [
        "fit",
        *BASELINE,
        *DEMO,
        *FEW,
        "--trainer.enable_progress_bar=false",
        "--model.weights=random",
        "--data.batch_size=4",
    ]
    ran = subprocess.run([sys.executable, "-m", "corrzoo", *args], check=True, capture_output=True, text=True)
    lines = [line for line in (ran.stderr + ran.stdout).splitlines() if line.strip(" ┏┡━┃│└┗─┳╇┴┓┩┘")]
    expected = [
        *("Seed set to 0", "GPU available: False, used: False", "TPU available: False"),
        "Baseline on efficientnet_lite0: 3,371,009 parameters, 700,769 of them trained",
        *("Baseline on efficientnet_lite0,", "validation pairs, 2 steps", "before", "val/pck"),
        *("`Trainer.fit` stopped: `max_epochs=1` reached", "matches: runs/Baseline-"),
        "The number of training batches (2) is smaller than the logging interval",  # not in the real demo
    ]
    surprises = [line for line in lines if not any(text in line for text in expected)]
    assert not surprises, ran.stderr + ran.stdout


def test_a_run_without_validation_prints_not_measured(tmp_path, capsys, recwarn):
    main(["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.max_steps=1"])
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 3 and "the run ended before its first validation" in " ".join(
        printed.split()
    )
    assert not [w for w in recwarn if "ModelCheckpoint" in str(w.message)]
    assert [p.name for p in tmp_path.glob("runs/*/*/checkpoints/*")] == ["last.ckpt"]


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "wandb"])
def test_one_option_moves_everything_that_a_run_writes(logger, tmp_path):
    config = [f"--config=trainer/{logger}"] if logger != "csv" else []
    few = [*TINY, *FEW, "--trainer.limit_train_batches=1", *config, "--trainer.default_root_dir=elsewhere"]
    main(["fit", *BASELINE, *DEMO, *few])
    wandb.finish()
    main(["test", *BASELINE, *DEMO, *few, "--ckpt_path=best"])
    wandb.finish()
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["elsewhere"]
    run, evaluation = sorted(
        tmp_path.glob("elsewhere/Baseline-timm-test_vit.r160_in1k/*"), key=lambda p: p.stat().st_mtime
    )
    assert (run / "config.yaml").is_file() and (run / "checkpoints" / "best.ckpt").is_file()
    assert (evaluation / "config.yaml").is_file() and (evaluation / "results" / "synthetic.json").is_file()
    # a saved configuration can run again elsewhere
    main(["test", f"--config={evaluation / 'config.yaml'}", "--trainer.default_root_dir=third"])
    assert list(tmp_path.glob("third/Baseline-timm-test_vit.r160_in1k/*/results/synthetic.json"))


def test_every_wandb_run_has_its_own_configuration(tmp_path):
    few = [*BASELINE, *DEMO, *TINY, *FEW, "--trainer.limit_train_batches=1", "--config=trainer/wandb"]
    for rate in (1e-3, 2e-3):
        main(["fit", *few, f"--model.lr={rate}"])
        wandb.finish()
    configs = [yaml.safe_load(path.read_text()) for path in tmp_path.rglob("config.yaml") if "wandb" not in path.parts]
    assert sorted(config["model"]["init_args"]["lr"] for config in configs) == [1e-3, 2e-3]
    for path in tmp_path.glob("runs/Baseline-*/*/checkpoints/best.ckpt"):
        assert {"config.yaml", "matches-fit.png"} <= {p.name for p in path.parents[1].iterdir()}


def test_a_run_that_fails_at_the_start_leaves_no_folder(tmp_path, capsys):
    args = ["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null"]
    failing(capsys, *args, "--model.weights=nowhere.pth")
    failing(capsys, *args, "--data.train=spair71k", "--data.download=false")
    failing(capsys, *args, "--model.finetune=none", "--model.learn_temperature=false")
    assert not list(tmp_path.glob("runs/*/*"))
    main(args)
    assert [p.name for p in tmp_path.glob("runs/*/*")] == ["version_0"]


def test_tensorboard_and_wandb_loggers(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    few = [*BASELINE, *DEMO, *TINY, *FEW, "--trainer.limit_train_batches=1"]
    main(["fit", *few, f"--config={CONFIGS / 'trainer' / 'tensorboard.yaml'}"])
    assert list(tmp_path.rglob("events.out.tfevents*"))
    main(["fit", *few, f"--config={CONFIGS / 'trainer' / 'wandb.yaml'}"])
    wandb.finish()
    assert list(tmp_path.rglob("offline-run-*"))
    assert list(tmp_path.glob("runs/Baseline-*/*/matches-fit.png"))  # in the folder of the run
    monkeypatch.delenv("WANDB_MODE", raising=False)  # set by Lightning's logger
    command = [sys.executable, "-m", "corrzoo", "fit", *few, "--trainer.logger=WandbLogger"]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    said = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and re.match("error: wandb: .*(API key|api_key).* configured", said)
    assert said.endswith("; --trainer.logger.offline true keeps the run on this machine")
