"""Metrics of two gloo processes equal those of one, also for an odd number of pairs and fewer pairs than processes."""

import pytest
import torch

from corrzoo.scoring.label_transfer import LabelTransfer
from corrzoo.scoring.pck import PCK
from corrzoo.types import Pair, ZooError
from processes import in_two_processes, join, leave

COUNTS = (9, 1, 0)


def pairs(count: int) -> tuple[torch.Tensor, Pair]:
    """Predictions and batch of `count` random pairs with up to 6 keypoints."""
    g = torch.Generator().manual_seed(count)
    kps = torch.randint(0, 64, (2, count, 6, 2), generator=g).float()
    mask = torch.rand(count, 6, generator=g) < 0.7
    mask[:, 0] = True
    image, size, none = torch.zeros(count, 3, 64, 64), torch.full((count, 2), 64.0), torch.full((count,), -1)
    box = torch.tensor([4.0, 4.0, 44.0, 60.0]).expand(count, 4)
    flags, category = torch.randint(-1, 3, (count, 4), generator=g), torch.randint(0, 3, (count,), generator=g)
    pred = kps[1] + 6 * torch.randn(count, 6, 2, generator=g)
    index = torch.arange(count)
    alike = torch.rand(count, 6, generator=g) < 0.5
    pair = Pair(image, image, *kps, mask, size, size, box, box, index, none, none, category, flags)
    return pred, pair._replace(trg_alike=alike)


def one_of(pair: Pair, i: int) -> Pair:
    return Pair(*(field[i : i + 1] if len(field) == len(pair.index) else field for field in pair))


def results(count: int, mine: list[int]) -> dict[str, object] | str:
    """All outputs of the metrics after this process has added the pairs `mine`, one at a time."""
    pred, pair = pairs(count)
    metric, masks = PCK(), LabelTransfer()
    for i in mine:
        metric.update(pred[i : i + 1], one_of(pair, i))
        masks.update(torch.eye(9).roll(i, 1).bool(), torch.eye(9).bool(), torch.ones(9, 9).tril().bool(), i, i % 3)
    try:
        out = {"averages": metric.compute(), "masks": masks.compute()}
        out |= {"rows": metric.rows(), "breakdown": metric.breakdown()}
        out |= {"mask rows": masks.rows(), "mask breakdown": masks.breakdown()}
        metric.update(pred[:1], one_of(pair, 0))
        return out | {"and again": metric.compute()}  # gathering leaves each process its own rows
    except ZooError as error:
        return str(error)


def work(rank: int, folder: str) -> None:
    join(rank, folder)
    out = {}
    for count in COUNTS:
        order = list(range(count)) + list(range(count % 2 if count > 1 else 0))  # as a sampler pads
        out[count] = results(count, order[rank::2])
    leave(out, rank, folder)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, object]]:
    return in_two_processes(work, tmp_path_factory.mktemp("gloo"))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("count", COUNTS)
def test_two_processes_compute_the_same_scores_as_one(two_processes: list[dict[int, object]], count: int) -> None:
    alone = results(count, list(range(count)))
    assert two_processes[0][count] == alone and two_processes[1][count] == alone
    if count == 0:
        assert alone == "PCK has no scored pairs: call update() with pairs that have keypoints"
    else:
        assert len(alone["rows"]) == count and alone["and again"] == alone["averages"]
        assert count == 1 or alone["breakdown"]["geometry"].keys() == {"aware", "other"}
