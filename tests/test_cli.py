"""The command line as a user meets it, in this process."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import corrzoo
from corrzoo.callbacks import PICTURES
from corrzoo.cli import main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "zoo_configs"
HEAD_CONFIGS = sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "demo.yaml")
TINY = [
    "--model.backbone=timm/test_vit.r160_in1k",
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
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as leaving:
        main(list(args))
    assert leaving.value.code not in (0, None)
    said = leaving.value.code if isinstance(leaving.value.code, str) else capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    return said


@pytest.mark.parametrize("config", HEAD_CONFIGS, ids=lambda p: p.stem)
def test_every_head_config_trains_on_synthetic_pairs(config, tmp_path):
    main(["fit", f"--config={config}", *DEMO, *TINY, *FEW, "--trainer.fast_dev_run=true"])


@pytest.mark.parametrize("config", sorted((CONFIGS / "demo").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_head_s_own_demo_file_goes_on_top(config):
    few = ['--data.options={"synthetic": {"length": {"trn": 8, "val": 5}}, "synthetic_warps": {"length": 8}}']
    files = [f"--config={CONFIGS / config.name}", *DEMO, f"--config={config}"]
    main(["fit", *files, *TINY, *few, "--trainer.fast_dev_run=true"])


STACKED = [p for folder in ("backbone", "data", "trainer", "ablation") for p in (CONFIGS / folder).glob("*.yaml")]


def base_of(config):
    """The head's YAML that a small one belongs to, by its name: actr_no_source_pe is for actr."""
    named = CONFIGS / f"{config.stem.split('_')[0]}.yaml"
    return named if named.exists() else CONFIGS / "baseline.yaml"


@pytest.mark.parametrize("config", STACKED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_stacked_config_parses(config, capsys):
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

    # the saved configuration is the run, and loads as it is
    saved = [f"--config={run / 'config.yaml'}"]
    main(["validate", *saved, f"--ckpt_path={checkpoint}"])
    main(["test", *saved, f"--ckpt_path={checkpoint}"])
    assert len(list(tmp_path.glob("runs/*/*/checkpoints/*"))) == 2  # evaluation leaves no checkpoints of its own
    result = json.loads(next(tmp_path.glob("runs/*/version_*/results/synthetic.json")).read_text())
    assert result["head"] == "Baseline" and result["pairs"] == 7 and result["protocol"] == "default:bbox"
    assert result["trained"] == {
        **{
            "dataset": "synthetic",
            "options": {"length": {"trn": 8, "val": 5, "test": 7}},
            "augment": "none",
            "size": 64,
        },
        **{"batch_size": 4, "max_epochs": 1, "max_steps": -1, "steps": 2, "seed": 0},
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
    # the run's own callback, which draws matches alone, stands in for the one that predictions come with
    assert [p.name for p in predictions.parents[1].glob("*.png")] == ["matches-predict.png"]

    # the same weights, read in Python, which know how they came to be
    model = corrzoo.load(checkpoint)
    assert model.image_size == 64 and model.trained == result["trained"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, content["state_dict"][name])


def test_predictions_come_with_every_picture(tmp_path, capsys):
    args = ["predict", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null", "--data.test=[synthetic]"]
    main(args)
    (folder,) = tmp_path.glob("runs/*/version_0")
    assert {p.name for p in folder.glob("*.png")} == {f"{kind}-predict.png" for kind in PICTURES}
    main([*args, "--model.backbone=timm/test_resnet.r160_in1k"])
    (folder,) = tmp_path.glob("runs/*resnet*/version_0")
    assert len(list(folder.glob("*.png"))) == len(PICTURES) - 1
    assert "foreground: not drawn, timm/test_resnet.r160_in1k has no class token" in capsys.readouterr().out


def test_pictures_while_training_and_a_result_writer_of_ones_own(tmp_path):
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


def test_a_checkpoint_does_not_silently_replace_the_model_asked_for(tmp_path, capsys):
    main(["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.limit_train_batches=1", "--trainer.callbacks=null"])
    (checkpoint,) = tmp_path.glob("runs/*/version_0/checkpoints/best.ckpt")
    said = failing(capsys, "test", *BASELINE, *DEMO, *TINY, *FEW, "--model.stride=4", f"--ckpt_path={checkpoint}")
    assert "stride=8" in said and "4" in said
    # what only evaluation uses may differ
    args = ["--model=Baseline", "--model.readout=argmax", *TINY, *FEW, "--data.test=[synthetic]"]
    main(["test", *args, f"--ckpt_path={checkpoint}"])
    results = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/version_*/results/synthetic.json")]
    assert results[-1]["options"]["readout"] == "argmax"


def test_a_checkpoint_brings_its_weights_and_says_how_they_came_to_be(tmp_path):
    main(["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.limit_train_batches=1", "--trainer.callbacks=null"])
    (checkpoint,) = tmp_path.glob("runs/*/version_0/checkpoints/best.ckpt")
    # `pretrained` could not be had here; nothing of the model needs to be said but its name
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
        (["fit", *BASELINE, "--data.trian=synthetic"], "did you mean 'data.train'"),
        (["fit", *BASELINE, "--data.train=spair"], "did you mean 'spair71k'"),
        (["fit", *BASELINE, "--trainer.max_epoch=1"], "did you mean 'trainer.max_epochs'"),
        (["fit", "--config=zoo_configs/basline.yaml"], "basline.yaml"),
        (["test", *BASELINE, "--model.alphas=[-1]"], "alphas [-1.0]"),
        (["fit", *BASELINE, "--model.protocol=nowhere"], "unknown protocol 'nowhere'"),
        (["fit", *BASELINE, "--model.stride=0"], "stride 0: expected a number above 0"),
        (["test", *BASELINE, "--data.test=[pfwillow,pfwillow]"], "names pfwillow more than once"),
        (["fit"], "no head was given"),
        (["fit", *BASELINE, "--trainer.strategy=dpp"], "unknown strategy 'dpp': did you mean 'ddp'"),
        (["test", *BASELINE, "--trainer.limit_test_batches=0"], "limit_test_batches 0 leaves nothing to evaluate"),
        (["fit", *BASELINE, *DEMO, *TINY, "--model.alphas=[0.05]"], "--checkpoint.monitor one of ['val/pck@0.05']"),
        (["fit", *DEMO, *BASELINE], "put --config zoo_configs/<head>.yaml (or --model <head>) first"),
        (["test", *BASELINE, *DEMO, *TINY, "--ckpt_path=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["test", *BASELINE, *DEMO, *TINY, "--model.protocol=cat"], "did you mean 'cats'"),
        (["fit", *BASELINE, "--data.root=nowhere", "--data.download=false", *TINY], "nowhere/SPair-71k"),
    ],
)
def test_a_mistake_gets_one_line_that_helps(args, expected, capsys):
    assert expected in failing(capsys, *args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    assert "gpu" in failing(capsys, "fit", *BASELINE, *DEMO, *TINY, "--trainer.accelerator=gpu")


def test_a_checkpoint_from_a_stranger_is_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path("owned").touch, ())

    torch.save({"state_dict": Evil()}, "evil.ckpt")
    said = failing(capsys, "test", *BASELINE, *DEMO, *TINY, "--ckpt_path=evil.ckpt")
    assert "refused" in said and not Path("owned").exists()


def test_a_folder_that_cannot_be_written_is_said_before_the_evaluation(tmp_path, capsys):
    Path("file").touch()
    said = failing(capsys, "test", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.logger.init_args.save_dir=file")
    assert "file" in said


def test_the_last_checkpoint_is_that_of_the_run_before(tmp_path, capsys):
    args = ["fit", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null"]
    assert "no last.ckpt under runs" in failing(capsys, *args, "--ckpt_path=last")
    main(args)
    main([*args, "--ckpt_path=last", "--trainer.max_epochs=2"])
    steps = [torch.load(p, weights_only=True)["global_step"] for p in tmp_path.glob("runs/*/*/checkpoints/last.ckpt")]
    assert sorted(steps) == [2, 4]


def test_without_a_logger_runs_follow_each_other_in_one_folder():
    for _ in range(2):
        main(["test", *BASELINE, *DEMO, *TINY, *FEW, "--trainer.callbacks=null", "--trainer.logger=false"])
    assert Path("results/synthetic.json").is_file()


def test_two_processes_leave_the_files_of_one(tmp_path):
    args = ["test", *BASELINE, *DEMO, *TINY, *FEW]
    main([*args, "--trainer.logger.save_dir=one"])
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger.save_dir=two"]
    # a process that waits for another in vain does not end
    subprocess.run([sys.executable, "-m", "corrzoo", *args, *two], check=True, capture_output=True, timeout=600)
    (one,), (other,) = (list(tmp_path.glob(f"{run}/*/*/results/synthetic.csv")) for run in ("one", "two"))
    assert one.read_text() == other.read_text()
    assert json.loads(other.with_suffix(".json").read_text())["processes"] == 2
    assert list(tmp_path.glob("two/*/*/matches-test.png"))


def test_loggers_by_flag(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    few = [*BASELINE, *DEMO, *TINY, *FEW, "--trainer.limit_train_batches=1"]
    main(["fit", *few, f"--config={CONFIGS / 'trainer' / 'tensorboard.yaml'}"])
    assert list(tmp_path.rglob("events.out.tfevents*"))
    main(["fit", *few, f"--config={CONFIGS / 'trainer' / 'wandb.yaml'}"])
    assert list(tmp_path.rglob("offline-run-*"))
    assert list(tmp_path.glob("runs/corrzoo/*/matches-fit.png"))  # not where the next run leaves its own
