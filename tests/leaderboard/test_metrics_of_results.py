"""The leaderboard reads what the zoo's metrics write: their measures, scores and breakdowns."""

import csv
import io

import pytest
import torch
from made_up import result

from corrzoo.leaderboard.render import to_csv
from corrzoo.leaderboard.rows import Spread
from corrzoo.scoring.label_transfer import LabelTransfer
from corrzoo.scoring.pck import PCK


def as_written(metric):
    """The result file that `corrzoo.callbacks.ResultsWriter` writes for a metric, shortened."""
    values = {key: value.item() for key, value in metric.compute().items()}
    content = result(breakdown=metric.breakdown(), measures=[list(column) for column in metric.columns()])
    del content["pck"]
    return content | metric.describe() | {metric.name.lower().replace(" ", "_"): values}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # rows are given, without `update`
@pytest.mark.parametrize(("protocol", "mean"), [("default:bbox", 62.5), ("geoaware:bbox", 40.0)])
def test_pck_is_averaged_over_images_or_points_as_the_protocol_says(board, protocol, mean):
    """Two pairs: 1 of 1 keypoint and 1 of 4 correct within 0.1, none within 0.05; the second has another viewpoint."""
    metric = PCK(protocol, (0.05, 0.1), categories=["bus"])
    rows = [[0, 0, 0, 0, 0, 0, 1, 0, 1], [1, 0, 2, 0, 0, 0, 4, 0, 1]]  # index, category, flags, keypoints, correct ones
    metric.table.append(torch.tensor(rows))
    (ranking,) = board(as_written(metric))
    (row,) = ranking.rows
    assert row.measured == {"PCK @0.05": Spread(0.0), "PCK @0.1": Spread(pytest.approx(mean))}
    assert row.groups["category", "bus"]["PCK @0.1"].mean == pytest.approx(mean)
    assert row.groups["viewpoint", "hard"]["PCK @0.1"].mean == pytest.approx(25.0)
    assert ("truncation", "none") in row.groups and ("viewpoint", "medium") not in row.groups


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_geometry_aware_scores_are_a_group_of_their_own(board):
    """Two pairs with 4 keypoints of which 2 are geometry-aware: 1 of them is correct, then 0; 2 others, then 1."""
    metric = PCK("default:bbox", (0.1,), categories=["bus"])
    metric.table.append(torch.tensor([[0, 0, 0, 0, 0, 0, 4, 3, 2, 1], [1, 0, 0, 0, 0, 0, 4, 1, 2, 0]]))
    (ranking,) = board(as_written(metric))
    groups = {group: spread["PCK @0.1"].mean for group, spread in ranking.rows[0].groups.items()}
    assert (groups["geometry", "aware"], groups["geometry", "other"]) == (25.0, 75.0)
    lines = list(csv.DictReader(io.StringIO(to_csv([ranking]))))
    assert [line["measured"] for line in lines if (line["group"], line["level"]) == ("geometry", "aware")] == ["25.0"]


def test_label_transfer(board):
    metric = LabelTransfer(["ant"])
    gt = torch.tensor([[True, True, False, False]])
    metric.update(torch.tensor([[True, False, False, False]]), gt, gt, index=0)
    (ranking,) = board(as_written(metric))
    scores = {"LT-ACC polygon": 75.0, "IoU polygon": 50.0, "LT-ACC mask": 100.0, "IoU mask": 100.0}
    assert {measure: spread.mean for measure, spread in ranking.rows[0].measured.items()} == pytest.approx(scores)
    found = ranking.rows[0].groups["category", "ant"]
    assert {measure: spread.mean for measure, spread in found.items()} == pytest.approx(scores)
