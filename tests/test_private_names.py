"""Private names of other libraries that the sources use, and what to do if a release removes them."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop
from torch.nn.modules import batchnorm

SRC = Path(__file__).resolve().parents[1] / "src" / "corrzoo"
DOCUMENTED = {"_replace", "_fields", "_asdict", "_make", "_exit"}
"""Names with an underscore that are public: those of NamedTuples, and os._exit."""


class Private(NamedTuple):
    """A private name in use."""

    file: str
    owner: Any
    remedy: str
    """What to do if the name was removed."""


LOOP = Trainer(accelerator="cpu", barebones=True).fit_loop
VALIDATION = (
    "Delete the last lines of ExactResume.on_train_start if tests/callbacks/test_resume.py passes without them: then "
    "Lightning makes a validation that was due at the checkpoint's step. Else write no checkpoint where one is due."
)
PRIVATE = {
    "_data_fetcher": Private("callbacks/resume.py", LOOP, VALIDATION),
    "_should_check_val_fx": Private("callbacks/resume.py", LOOP.epoch_loop, VALIDATION),
    "_restart_stage": Private("callbacks/resume.py", LOOP.epoch_loop.val_loop, VALIDATION),
    "_batches_that_stepped": Private("callbacks/resume.py", LOOP.epoch_loop, VALIDATION),
    "_iteration_based_training": Private(
        "callbacks/resume.py",
        _FitLoop,
        "Delete the line in ExactResume.setup if tests/callbacks/test_resume.py passes without it: Lightning then "
        "resumes a run with max_steps in the epoch in which it stopped. Else find what decides in _FitLoop.restarting.",
    ),
    "_BatchNorm": Private(
        "backbones/backbone.py",
        batchnorm,
        "List BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm instead: frozen ones stay in eval mode.",
    ),
    "_version": Private(
        "backbones/position.py",
        torch.Tensor,
        "Call ResizeOnce.forget wherever the embedding is written, or resize at every step.",
    ),
}

TREES = {path: ast.parse(path.read_text()) for path in sorted(SRC.rglob("*.py"))}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in DOCUMENTED


def own_names() -> set[str]:
    """Private names that the package defines: functions, classes, variables, and attributes of `self`."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
                found.add(node.attr)
    return found


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def foreign_names() -> Iterator[tuple[str, str]]:
    """File and name of every private name that the package uses without defining it."""
    own = own_names()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                assigned_elsewhere = isinstance(node.ctx, ast.Store) and not of_self(node)
                names = [node.attr] if node.attr not in own or assigned_elsewhere else []
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("corrzoo"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
                names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from ((str(path.relative_to(SRC)), name) for name in names if private(name))


def test_every_private_name_in_use_is_listed() -> None:
    listed = {(entry.file, name) for name, entry in PRIVATE.items()}
    assert set(foreign_names()) == listed, "list it in PRIVATE, with what to do when it is gone; or do without it"


@pytest.mark.parametrize("name", PRIVATE)
def test_every_listed_name_exists(name: str) -> None:
    assert hasattr(PRIVATE[name].owner, name), PRIVATE[name].remedy


def classes() -> list[type]:
    """Classes of the package with a base of another library."""
    found = []
    for path in TREES:
        parts = ["corrzoo", *path.relative_to(SRC).with_suffix("").parts]
        if parts[-1] in ("__init__", "__main__"):
            continue
        module = importlib.import_module(".".join(parts))
        found += [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    return [cls for cls in found if any(others(cls))]


def others(cls: type) -> list[type]:
    """Base classes in libraries whose sources can be read."""
    libraries = ("torch", "lightning", "torchmetrics")
    return [
        b for b in cls.__mro__ if b.__module__.split(".")[0] in libraries and not b.__module__.startswith("torch._C")
    ]


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_no_private_name_of_a_base_class_is_overridden(cls: type) -> None:
    """A subclass must not override one by accident."""
    tree = next(n for n in ast.walk(ast.parse(inspect.getsource(cls).lstrip())) if isinstance(n, ast.ClassDef))
    taken = {name for name in vars(cls) if private(name)} - {"_abc_impl", "_backward_cls"}  # set by metaclasses
    stores = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    taken |= {node.attr for node in stores if of_self(node) and private(node.attr)}
    for base in others(cls):
        source = inspect.getsource(base)
        clashes = {name for name in taken if hasattr(base, name) or re.search(rf"\bself\.{name}\b", source)}
        assert not clashes, f"{cls.__name__} takes {clashes} of {base.__name__}"
