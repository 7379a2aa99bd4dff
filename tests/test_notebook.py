"""notebooks/compare_heads.ipynb runs in any folder, offline, in minutes, and is committed with outputs."""

import base64
import io
import re
import resource
import runpy
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

import corrzoo

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "compare_heads.ipynb"
MINUTES = 5


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, executed in an empty folder without a network, and its run time on an idle machine in seconds."""
    folder = tmp_path_factory.mktemp("reader")
    execute = runpy.run_path(str(NOTEBOOK.with_name("execute.py")))["execute"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
        patch.setenv("NO_PROXY", "")
        wall, cpu = time.perf_counter(), children_seconds()
        notebook = execute(NOTEBOOK, folder)  # raises when a cell fails
    return notebook, min(time.perf_counter() - wall, children_seconds() - cpu)  # others may use the machine, too


def children_seconds():
    """CPU seconds of the child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(params=["committed", "executed"])
def notebook(request):
    if request.param == "committed":
        return nbformat.read(NOTEBOOK, as_version=4)
    return request.getfixturevalue("executed")[0]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    """Pictures of a cell, (H, W, 3) arrays."""
    found = [output.data["image/jpeg"] for output in cell.outputs if "image/jpeg" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_it_runs_in_minutes(executed):
    assert executed[1] < 60 * MINUTES


def test_every_cell_was_executed_in_order_without_warnings(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds == {"execute_result", "display_data"}  # no errors, and no streams: warnings and progress bars


def test_every_figure_has_content(notebook):
    figures = [cell for cell in code_cells(notebook) if "figure" in cell.metadata.get("tags", [])]
    assert len(figures) == 6
    for cell in code_cells(notebook):
        assert len(pictures(cell)) == (cell in figures), cell.id
    for cell in figures:
        (picture,) = pictures(cell)
        assert min(picture.shape[:2]) > 200 and picture.std() > 10, cell.id


def test_the_tables_name_every_head(notebook):
    texts = [o.data["text/markdown"] for c in code_cells(notebook) for o in c.outputs if "text/markdown" in o.data]
    trained_here, study = texts
    heads = corrzoo.list_heads()
    assert len(heads) == 10
    assert all(f"| {head} |" in trained_here for head in heads)
    assert all(f"| {head} |" in study for head in heads)


def test_outputs_contain_no_machine_paths_or_times(notebook):
    said = [
        str(value) for c in code_cells(notebook) for o in c.outputs for k, value in o.data.items() if "image" not in k
    ]
    assert not re.search(r"(?<![\w.])/\w+/|[A-Z]:\\|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d", "\n".join(said))
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert all(cell.metadata.keys() <= {"tags"} for cell in notebook.cells)


def test_the_file_is_small():
    assert NOTEBOOK.stat().st_size < 1.5e6


def test_links_have_a_target():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        for target in re.findall(r"\]\((?!http)([^)#]+)", cell.source if cell.cell_type == "markdown" else ""):
            assert (NOTEBOOK.parent / target).exists(), target
