"""Golden values of the released code of ACTR and LPMFlow, and our models with the same weights."""

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corrzoo.store.official import LAYOUTS, official_key
from corrzoo.types import Pair


class Golden:
    """Content of the folder `golden`, see its README."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
        spec = importlib.util.spec_from_file_location("closed_form", folder / "closed_form.py")
        self.closed_form = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.closed_form)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return np.load(self.folder / f"{name}.npz")

    def manifest(self, name: str) -> list[tuple[str, list[int], str]]:
        return [tuple(entry) for entry in json.loads((self.folder / f"{name}_state_dict.json").read_text())]

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


def assert_close(ours: Tensor, theirs: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=tolerance)
