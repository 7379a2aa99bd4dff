"""Every script of benchmarks/ can be imported: a name that it imports and that is gone shows here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
CODE = """
import importlib, json, sys, traceback
errors = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except (Exception, SystemExit):
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """Traceback by script. One process imports all, as most of the time goes to what they share."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    command, environment = [sys.executable, "-c", CODE, *SCRIPTS], os.environ | {"PYTHONPATH": path}
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_imported(script, errors):
    assert script not in errors, f"benchmarks/{script}.py: {errors[script]}"
