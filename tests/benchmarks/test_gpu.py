"""The script for a GPU, rehearsed on a CPU: each part runs and writes its files."""

import csv
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import corrzoo

ROOT = Path(__file__).resolve().parents[2]
HEADS = corrzoo.list_heads()


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *args]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def status(out: Path) -> dict[str, str]:
    return {row["part"]: row["status"] for row in read(out / "parts.csv")}


@pytest.fixture
def without_jsonargparse(tmp_path):
    """A folder for PYTHONPATH in which jsonargparse cannot be imported."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['jsonargparse'] = None\n")
    return str(folder)


def test_rehearsal_runs_every_part(tmp_path):
    """With one head: all ten take minutes. On CUB, too, where it is."""
    out, data = tmp_path / "out", ROOT.parent / "shared"
    cub = (data / "CUB_200_2011").is_dir()
    data = data if cub else tmp_path / "data"
    ran = run(str(out), "--rehearse", HEADS="Baseline", DATA=str(data))
    logs = {path.name: path.read_text()[-2000:] for path in out.glob("*.log")}
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    names = ["op_tests", "op", "steps", "steps_authors", "steps_one", "fit_Baseline", "study_synthetic"]
    expected = dict.fromkeys([*names, *(["steps_compiled"] if compiler else [])], "0")
    photographs = "0" if cub else f"skipped: no {data}/CUB_200_2011"
    expected |= dict.fromkeys(["study_cub_frozen", "study_cub_finetuned"], photographs)
    assert status(out) == expected, logs
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in logs["op_tests.log"] and "failed" not in logs["op_tests.log"]
    assert {row["method"] for row in read(out / "correlation_cpu.csv")} == {"corrzoo", "eager"}
    plain = ("Baseline", "False")
    tables = {".": [plain], "authors": [("ACTR", "False")], "one": [plain]}
    for folder, models in (tables | ({"compiled": [plain, ("Baseline", "True")]} if compiler else {})).items():
        rows = read(out / folder / "step_cpu.csv")
        assert [(row["head"], row["compiled"]) for row in rows] == models
        assert all(float(row["step_ratio"]) > 0 for row in rows)
    (metrics,) = (out / "fit").rglob("metrics.csv")
    assert any(row["val/pck@0.1"] for row in read(metrics))
    studied = sorted(f"{path.parent.name}/{path.name}" for path in (out / "study").glob("*/*.json"))
    names = ["synthetic/gsf_untrained-0.json", "synthetic_160/gsf-0.json"]
    if cub:  # and what was trained or not on CUB is tested on PF-WILLOW, too
        names += [f"cub_frozen{data}/gsf_untrained-0.json" for data in ("", "_pfwillow")]
        names += [f"cub_{kind}_160{data}/gsf-0.json" for kind in ("finetuned", "frozen") for data in ("", "_pfwillow")]
    assert studied == sorted(names)
    with tarfile.open(out / "results.tgz") as tar:
        assert {"./parts.csv", "./step_cpu.csv", "./study/synthetic_160/gsf-0.json"} <= set(tar.getnames())


def test_parts_without_time_or_without_their_modules_are_skipped_with_the_reason(tmp_path, without_jsonargparse):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = run(str(tmp_path / "out"), LIMIT="0", PATH=path, PYTHONPATH=without_jsonargparse)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = status(tmp_path / "out")
    assert [found.pop(f"study_{name}") for name in ("cub_frozen", "cub_finetuned")] == 2 * [
        f"skipped: no {tmp_path / 'data'}/CUB_200_2011"
    ]
    needs = {name for name, reason in found.items() if reason == "skipped: no module jsonargparse"}
    assert needs == {"study_synthetic", *(f"fit_{head}" for head in HEADS)}
    left = {reason for name, reason in found.items() if name not in needs}
    assert len(found) > len(needs) and all(reason.endswith("seconds left") for reason in left)


def test_step_times_need_no_jsonargparse(tmp_path, without_jsonargparse):
    code = "import step; step.HEADS['Baseline'](backbone='timm/test_vit.r160_in1k', weights='random')"
    path = os.pathsep.join([without_jsonargparse, str(ROOT / "src"), str(ROOT / "benchmarks")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_without_a_gpu_it_says_so(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    ran = run(str(tmp_path / "out"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ran.returncode == 1 and "no NVIDIA GPU here: give --rehearse" in ran.stderr


def test_the_output_folder_is_asked_for():
    ran = run()
    assert ran.returncode == 2 and "bash benchmarks/gpu.sh OUT" in ran.stdout
