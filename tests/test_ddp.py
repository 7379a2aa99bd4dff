"""Two gloo processes equal one process on the joined batch: losses, gradients, weights, rows of scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fixtures import write_synthetic_spair
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.data.module import PairsDataModule
from corrzoo.types import Pair
from processes import in_two_processes, join, leave
from small import SMALL, VIT, disturb

CNN = "timm/test_resnet.r160_in1k"
CASES = {
    "Baseline": {},
    "Baseline, CNN": {"backbone": CNN, "levels": [1, 2]},
    "ACTR": {"grid": 4, "depth": 2},
    "ViTSC": {"head_resolution": 0.125, "low_stages": 1},
    "LPMFlow": {"grid": 4, "depth": 2, "foreground": "mean"},
    "CATs": {"backbone": CNN, "levels": ["layer2.0:pre", 2], "grid": 4, "width": 32},
    "TransforMatcher": {"grid": 4, "two_streams": True},
    "GSF, stage 1": {"grid": 8},
    "GSF, stage 2": {"grid": 8},
    "GeoAware": {"backbone": CNN, "levels": [1, 2], "grid": 4, "width": 128, "noise": 0.0},
    "MirrorGuided": SMALL["MirrorGuided"],
    "MirrorGuided, no layers": {"backbone": CNN, "levels": [1, 2]},
    "NCNet": {"kernel_sizes": [3, 3], "channels": [4, 1]},
}
STEPS = 2  # a parameter that got no gradient is an error in the second


def joined() -> Pair:
    """Four pairs with very different numbers of keypoints per process; one pair has none."""
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=64)
    pair = PairDataset.collate([dataset[i] for i in range(4)])
    first = torch.arange(pair.kps_mask.shape[1])
    few = torch.stack([first < n for n in (0, 9, 2, 9)])
    pair.src_box[2] = torch.nan  # GSF counts cells on the object: here everywhere
    return pair._replace(kps_mask=pair.kps_mask & few)


class Step(nn.Module):
    """Training step as a forward pass, as DistributedDataParallel needs it."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        head, options = case.split(",")[0], {"backbone": VIT} | CASES[case]
        self.model = corrzoo.create_matcher(head, weights="random", **options).double()
        self.model.log_dict = lambda terms, **_: self.logged.update({k: v.item() for k, v in terms.items()})
        self.trainer = Trainer(log_every_n_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu")
        self.model.trainer = self.trainer  # a logged step reports the mean over processes
        self.model.stage2_from = int(case == "GSF, stage 1")
        self.logged: dict[str, float] = {}
        disturb(self.model)
        for module in self.model.modules():  # whose draws depend on the size of the batch
            if isinstance(module, nn.Dropout | nn.Dropout2d):
                module.p = 0.0
        if head == "LPMFlow":
            self.model.draw_ranks = lambda count, _: torch.arange(self.model.masked).expand(count, -1)

    def forward(self, pair: Pair) -> Tensor:
        return self.model.training_step(pair, 0)


def gradients(case: str, pair: Pair) -> dict[str, Tensor]:
    """Gradient of each parameter after a step, and logged values."""
    torch.use_deterministic_algorithms(True)
    step = Step(case)
    run = DistributedDataParallel(step) if dist.is_initialized() else step
    for _ in range(STEPS):
        run.zero_grad()
        run(pair).backward()
    found = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    return found | {f"logged {k}": torch.tensor(v, dtype=torch.float64) for k, v in step.logged.items()}


def run(folder: str, processes: int) -> dict[str, Any]:
    """Two epochs of training, then two test sets, one of them with fewer pairs than processes."""
    seed_everything(0)
    lengths = {"synthetic": {"length": {"trn": 11, "val": 5, "test": 1}}}
    data = PairsDataModule(
        "synthetic", test=["synthetic", "spair71k"], root=folder, image_size=64, batch_size=4, num_workers=0,
        packed=False, options=lengths,
    )  # fmt: skip
    several: dict[str, Any] = {"strategy": "ddp", "plugins": [TorchElasticEnvironment()]} if processes > 1 else {}
    quiet: dict[str, Any] = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=processes, precision="64-true", enable_checkpointing=False,
        default_root_dir=f"{folder}/{processes}", **quiet, **several,
    )  # fmt: skip
    model = corrzoo.create_matcher("Baseline", backbone=VIT, weights="random", backbone_lr=1e-3)
    trainer.fit(model, data)
    out: dict[str, Any] = {"weights": model.state_dict(), "val": dict(model.scores)}
    trainer.test(model, data, verbose=False)
    for name, metric in model.evaluation.by_name():
        values = {key: value.item() for key, value in metric.compute().items()}
        out[name] = {"averages": values, "rows": metric.rows(), "breakdown": metric.breakdown()}
    return out


def work(rank: int, folder: str) -> None:
    join(rank, folder)
    mine = Pair(*(field[rank::2] if len(field) == 4 else field for field in joined()))
    found: dict[str, Any] = {case: gradients(case, mine) for case in CASES}
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, str(value))
        found["run"] = run(folder, 2)
    leave(found, rank, folder)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    write_synthetic_spair(folder, pairs_per_split=9, images_per_category=3, size=64)
    return in_two_processes(work, folder)


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_two_processes_equals_one_on_the_joined_batch(two_processes: list, case: str) -> None:
    alone = gradients(case, joined())
    assert any(value.any() for value in alone.values())
    for found in two_processes:
        assert found[case].keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[case][name], value, rtol=1e-6, atol=1e-9)


def test_a_run_of_two_processes_equals_one(two_processes: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("alone")
    write_synthetic_spair(folder, pairs_per_split=9, images_per_category=3, size=64)
    alone, (first, second) = run(str(folder), 1), (found["run"] for found in two_processes)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-7, atol=1e-10)
        assert torch.equal(first["weights"][name], second["weights"][name])
    assert len(alone["synthetic"]["rows"]) == 1 and len(alone["spair71k"]["rows"]) == 9
    for name in ("val", "synthetic", "spair71k"):
        assert first[name] == second[name] == alone[name]


def test_no_configuration_searches_for_unused_parameters() -> None:
    configs = Path(__file__).resolve().parents[1] / "zoo_configs"
    assert not [path for path in configs.rglob("*.yaml") if "find_unused" in path.read_text()]
