"""What the compiler makes of the kernels for GPUs that are not here."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which compiles the kernels")


@pytest.fixture(scope="module")
def table() -> list[dict[str, str]]:
    """One row for each kernel, case, dtype and architecture; compiled elsewhere, as here the interpreter is on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, script, "--quick"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()))


def test_no_kernel_spills_registers(table: list[dict[str, str]]) -> None:
    assert len(table) >= 36
    assert [row for row in table if int(row["spills"]) or int(row["stack_bytes"])] == []


def test_half_precision_products_run_on_tensor_cores(table: list[dict[str, str]]) -> None:
    half = [row for row in table if row["dtype"] == "bf16"]
    assert {row["arch"] for row in half} == {"80", "90", "100"}
    assert [row for row in half if int(row["tensor_core"]) == 0] == []


def test_programs_fit_the_shared_memory(table: list[dict[str, str]]) -> None:
    """163 KiB on sm_80, 227 on sm_90 and sm_100."""
    limit = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}
    assert [row for row in table if int(row["shared_bytes"]) > limit[row["arch"]]] == []
