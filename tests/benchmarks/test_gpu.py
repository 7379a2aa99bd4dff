"""The script for a GPU, rehearsed on a CPU: each of its parts runs and leaves its files."""

import csv
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def parts(out: Path) -> dict[str, str]:
    with (out / "parts.csv").open() as file:
        return {row["part"]: row["status"] for row in csv.DictReader(file)}


def test_rehearsal_runs_every_part(tmp_path):
    out = tmp_path / "out"
    ran = run(str(out), "--rehearse")
    logs = {path.name: path.read_text()[-2000:] for path in out.glob("*.log")}
    heads = ["baseline", "gsf", "vitsc", "lpmflow", "actr"]
    names = ["op_tests", "op", "steps", *(f"fit_{head}" for head in heads), "study_synthetic"]
    assert parts(out) == dict.fromkeys(names, "0"), logs
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with (out / "step_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["precision"] for row in rows} == {"fp32", "bf16"} and len({row["head"] for row in rows}) >= 5
    assert (out / "correlation_cpu.csv").is_file()
    assert {path.name for path in (out / "study" / "synthetic").glob("*.json")} == {"gsf-0.json", "gsf_untrained-0.json"}


def test_without_time_every_part_is_skipped_and_the_status_says_so(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    ran = run(str(tmp_path / "out"), LIMIT="0", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert set(parts(tmp_path / "out").values()) == {"skipped"} and ran.returncode == 0


def test_the_output_folder_is_asked_for():
    ran = run()
    assert ran.returncode == 2 and "bash benchmarks/gpu.sh OUT" in ran.stdout
