"""Execute notebooks/compare_heads.ipynb and keep its outputs: `python notebooks/execute.py`.

What differs between two executions of the same code is left out: times, ids of the kernel, the environment's version.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("compare_heads.ipynb")


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook, executed top to bottom in a working folder.

    Raises:
        nbclient.exceptions.CellExecutionError: when a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", record_timing=False, resources=where)
    client.execute(env=os.environ | {"CORRZOO_CACHE": str(folder / "cache")})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(NOTEBOOK, Path(folder)), NOTEBOOK)
