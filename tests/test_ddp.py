"""Two gloo processes train as one does on the joined batch: the loss that is logged, and every gradient."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import corrzoo
from corrzoo.data import PairDataset
from corrzoo.types import Pair

VIT, CNN = "timm/test_vit.r160_in1k", "timm/test_resnet.r160_in1k"
CASES = {
    "Baseline": {},
    "Baseline, CNN": {"backbone": CNN, "levels": [1, 2]},
    "ACTR": {"grid": 4, "depth": 2},
    "ViTSC": {"head_resolution": 0.125, "low_stages": 1},
    "LPMFlow": {"grid": 4, "depth": 2, "foreground": "mean"},
    "GSF, stage 1": {"grid": 8},
    "GSF, stage 2": {"grid": 8},
}
STEPS = 2  # a parameter that got no gradient is an error in the second


def joined() -> Pair:
    """Four pairs of which the two processes get very different numbers of keypoints, and one pair has none."""
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=64)
    pair = PairDataset.collate([dataset[i] for i in range(4)])
    first = torch.arange(pair.kps_mask.shape[1])
    few = torch.stack([first < n for n in (0, 9, 2, 9)])
    pair.src_box[2] = torch.nan  # GSF counts cells on the object: here everywhere
    return pair._replace(kps_mask=pair.kps_mask & few)


class Step(nn.Module):
    """A training step as a forward pass, which is what DistributedDataParallel watches."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        head, options = case.split(",")[0], {"backbone": VIT} | CASES[case]
        self.model = corrzoo.create_matcher(head, weights="random", **options).double()
        self.model.log_dict = lambda terms, **_: self.logged.update({k: v.item() for k, v in terms.items()})
        self.model.stage2_from = int(case == "GSF, stage 1")
        self.logged: dict[str, float] = {}
        with torch.no_grad():
            for p in self.model.parameters():  # nothing stands at an initial zero that hides a wrong gradient
                p += 0.02 * torch.randn_like(p)
        for module in self.model.modules():  # whose draws depend on the size of the batch
            if isinstance(module, nn.Dropout | nn.Dropout2d):
                module.p = 0.0
        if head == "LPMFlow":
            self.model.draw_ranks = lambda count, _: torch.arange(self.model.masked).expand(count, -1)

    def forward(self, pair: Pair) -> Tensor:
        return self.model.training_step(pair, 0)


def gradients(case: str, pair: Pair) -> dict[str, Tensor]:
    """What a step leaves in each parameter, and what it logged."""
    torch.use_deterministic_algorithms(True)
    step = Step(case)
    run = DistributedDataParallel(step) if dist.is_initialized() else step
    for _ in range(STEPS):
        run.zero_grad()
        run(pair).backward()
    found = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    return found | {f"logged {k}": torch.tensor(v, dtype=torch.float64) for k, v in step.logged.items()}


def work(rank: int, folder: str) -> None:
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    mine = Pair(*(field[rank::2] if len(field) == 4 else field for field in joined()))
    torch.save({case: gradients(case, mine) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    other = mp.get_context("spawn").Process(target=work, args=(1, str(folder)))
    other.start()
    work(0, str(folder))
    other.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_two_processes_is_that_of_one(two_processes: list, case: str) -> None:
    alone = gradients(case, joined())
    assert any(value.any() for value in alone.values())
    for found in two_processes:
        assert found[case].keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[case][name], value, rtol=1e-6, atol=1e-9)


def test_no_configuration_looks_for_unused_parameters() -> None:
    configs = Path(__file__).resolve().parents[1] / "zoo_configs"
    assert not [path for path in configs.rglob("*.yaml") if "find_unused" in path.read_text()]
