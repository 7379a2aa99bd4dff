"""Golden values of released code, and our models with the same weights."""

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corrzoo.store.official import LAYOUTS, official_key
from corrzoo.types import Pair


class Golden:
    """Content of the folder `golden`, see its README."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
        self.closed_form = closed_form(folder)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return np.load(self.folder / f"{name}.npz")

    def manifest(self, name: str) -> list[tuple[str, list[int], str]]:
        path = self.folder / f"{name}_state_dict.json"
        if not path.is_file():
            path = self.folder / "further" / name / "state_dict.json"
        return [tuple(entry) for entry in json.loads(path.read_text())]

    def official_state(self, name: str) -> dict[str, Tensor]:
        """The authors' state dict with closed-form weights."""
        return {key: self.value(key, shape) for key, shape, _ in self.manifest(name)}

    def value(self, key: str, shape: list[int]) -> Tensor:
        match key.rpartition(".")[2]:
            case "x_normal" | "y_normal":
                return torch.from_numpy(np.linspace(-1, 1, shape[0]).astype(np.float32))
            case "relative_position_index":
                return torch.zeros(shape, dtype=torch.int64)
        return self.closed_form.value(key, shape)

    def images(self) -> tuple[Tensor, Tensor]:
        src, trg, _ = self.closed_form.images(self.config["image_seed"])
        return src, trg

    def pair(self) -> Pair:
        """Stored keypoints, in pixels of 512 x 512 images."""
        data = self.arrays("data")
        src, trg = (torch.from_numpy(data[key]).transpose(1, 2) for key in ("src_kps", "trg_kps"))
        mask = torch.arange(src.shape[1]) < torch.from_numpy(data["n_pts"]).unsqueeze(1)
        image, size, box = torch.zeros(2, 3, 512, 512), torch.full((2, 2), 512.0), torch.full((2, 4), torch.nan)
        number = torch.arange(2)
        return Pair(
            image, image, src, trg, mask, size, size, box, box, number, number, number, number, number.new_zeros(2, 4)
        )

    def gradients(self, name: str) -> dict[str, Any]:
        """Training losses, and norm, sum and first element of every parameter's gradient."""
        return json.loads((self.folder / f"{name}_grads_f64.json").read_text())

    def assert_gradients(self, name: str, model: nn.Module) -> None:
        """Compare norm, sum and first element of every gradient, with relative tolerance 1e-6.

        Sums that are zero up to rounding (a LayerNorm follows) are compared relative to the norm.
        """
        stored = self.gradients(name)["grads"]
        names = {official_key(key, LAYOUTS[name].names): key for key, _ in model.named_parameters()}
        assert names.keys() == {key for key, numbers in stored.items() if numbers is not None}
        for theirs, ours in names.items():
            gradient, (norm, total, first) = model.get_parameter(ours).grad, stored[theirs]
            found = [gradient.norm(), gradient.sum(), gradient.flatten()[0]]
            np.testing.assert_allclose(found, [norm, total, first], rtol=1e-6, atol=1e-12 * norm, err_msg=theirs)


class Further:
    """What lies in the folder `golden/further/<head>`, or in `$CORRZOO_GOLDEN/<head>`: see the README there.

    Everything that sizes depend on is read from its `config.json`, so that other values can take the place of these.
    """

    def __init__(self, head: str) -> None:
        beside = Path(__file__).resolve().parents[2] / "shared" / "golden" / "further"
        self.folder = Path(os.environ.get("CORRZOO_GOLDEN", beside)) / head
        if not (self.folder / "config.json").is_file():
            pytest.skip(f"needs the golden values in {self.folder}: set CORRZOO_GOLDEN")
        self.config = json.loads((self.folder / "config.json").read_text())
        self.closed_form = closed_form(self.folder.parent)

    def read(self, name: str) -> Any:
        """The content of a JSON file."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def arrays(self, name: str) -> dict[str, Tensor]:
        """The arrays of an .npz file, as tensors."""
        with np.load(self.folder / f"{name}.npz") as file:
            return {key: torch.from_numpy(value) for key, value in file.items()}

    def manifest(self) -> list[tuple[str, list[int], str]]:
        return [tuple(entry) for entry in self.read("state_dict")]

    def state(self, manifest: list[tuple[str, list[int], str]], gains: str = "gains") -> dict[str, Tensor]:
        """The authors' state dict in float32, filled by the recipe; what it keeps as constructed is made here."""
        kept = {}
        for key, shape, _ in manifest:
            match key.rpartition(".")[2]:
                case "x_normal" | "y_normal":
                    kept[key] = torch.from_numpy(np.linspace(-1, 1, shape[0]).astype(np.float32))
                case "freqs":
                    kept[key] = torch.from_numpy(np.linspace(1, 5, shape[0]) * np.pi).float()
                case "num_batches_tracked":
                    kept[key] = torch.zeros(shape, dtype=torch.int64)
        positive = self.config.get("positive", ())
        return self.closed_form.state(manifest, self.config["salt"], self.config.get(gains, ()), kept, positive)

    def features(self, shapes: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels of source and target in float64, named level0, level1, ..."""
        seed = self.config["feature_seed"]
        pairs = [self.closed_form.feature(seed, f"level{i}", shape) for i, shape in enumerate(shapes)]
        src, trg = zip(*pairs, strict=True)
        return [level.double() for level in src], [level.double() for level in trg]

    def images(self, size: int) -> tuple[Tensor, Tensor]:
        """Normalised source and target images in float64."""
        src, trg = self.closed_form.images(self.config["image_seed"], size)
        return src.double(), trg.double()


def assert_gradients(model: nn.Module, stored: dict[str, Any], names: dict[str, str], tolerance: float = 1e-6) -> None:
    """Norm, sum and first element of every parameter's gradient, relative to itself.

    What is zero but for rounding is held to the norm, or to the largest norm of all.

    Args:
        model: After the backward pass.
        stored: The authors' numbers by their keys; null where the output does not depend on the parameter.
        names: Their key for each of ours.
        tolerance: Relative.
    """
    assert set(names.values()) == {key for key, numbers in stored.items() if numbers is not None}
    largest = max(stored[key][0] for key in names.values())
    for ours, theirs in names.items():
        gradient, (norm, total, first) = model.get_parameter(ours).grad, stored[theirs]
        found = [gradient.norm(), gradient.sum(), gradient.flatten()[0]]
        atol = 1e-12 * norm + 1e-14 * largest
        np.testing.assert_allclose(found, [norm, total, first], rtol=tolerance, atol=atol, err_msg=theirs)


def closed_form(folder: Path) -> Any:
    """The module closed_form.py of a folder."""
    spec = importlib.util.spec_from_file_location("closed_form", folder / "closed_form.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_dropout(model: nn.Module) -> nn.Module:
    """Set training mode without dropout, as for the golden gradients."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.eval()
    return model


@contextmanager
def record(model: nn.Module, names: str) -> Iterator[dict[str, list[tuple[tuple, object]]]]:
    """Record inputs and outputs of modules whose name matches, call by call."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda m, given, answer, name=name: seen.setdefault(name, []).append((given, answer))
        )
        for name, module in model.named_modules()
        if re.fullmatch(names, name)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def assert_close(ours: Tensor, theirs: np.ndarray | Tensor, tolerance: float) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=tolerance)
