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
    assert len(table) >= 48
    assert {row["arch"] for row in table} == {"80", "90", "100"}
    assert [row for row in table if int(row["spills"]) or int(row["stack_bytes"])] == []


def test_rows_are_read_16_bytes_a_thread(table: list[dict[str, str]]) -> None:
    """Where the grid's width allows."""
    rows = [row for row in table if row["kernel"] in ("positions", "product_gradients") and "37²" not in row["case"]]
    assert rows and [row for row in rows if int(row["wide_loads"]) == 0] == []


def test_programs_fit_the_shared_memory(table: list[dict[str, str]]) -> None:
    """48 KiB, beyond which fewer programs would run at a time."""
    assert [row for row in table if int(row["shared_bytes"]) > 48 * 1024] == []
