"""Published numbers: beside the measured ones of the same configuration, and in rankings of their own."""

import pytest
from made_up import result

from corrzoo.leaderboard.papers import rank_papers, read_papers
from corrzoo.leaderboard.render import tabulate
from corrzoo.leaderboard.rows import Spread


def test_published_number_of_the_same_configuration_is_shown(board):
    (ranking,) = board(result(80.0), papers=read_papers())
    (row,) = ranking.rows
    assert row.published == {"PCK @0.01": 7.0, "PCK @0.05": 58.6, "PCK @0.1": 78.2} and row.source == "ViTSC, Table 1"
    assert row.difference("PCK @0.1") == pytest.approx(1.8) and row.difference("PCK @0.05") == pytest.approx(40 - 58.6)
    assert row.difference("PCK @0.01") is None
    assert {"PCK @0.1", "published @0.1", "difference @0.1"} <= set(tabulate(ranking)[1])


@pytest.mark.parametrize(
    "change",
    [
        {"head": "GSF"},
        {"backbone": "dinov2_s14"},
        {"dataset": "pfpascal"},
        {"split": "val"},
        {"protocol": "default:img"},
        {"resolution": 448},
        {"label": "ablation"},
        {"trained": None},
        {"trained": {"dataset": "synthetic", "seed": 0}},
        {"supervision": "weak"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_no_published_number_of_another_configuration_is_shown(board, change):
    (ranking,) = board(result(80.0, **change), papers=read_papers())
    assert ranking.rows[0].published == {} and ranking.rows[0].difference("PCK @0.1") is None
    assert not any(title.startswith(("published", "difference")) for title in tabulate(ranking)[1])


def test_zero_shot_is_compared_with_published_zero_shot(board):
    (ranking,) = board(result(40.0, trained=None, checkpoint=None), papers=read_papers())
    assert ranking.rows[0].published == {"PCK @0.01": 1.3, "PCK @0.05": 20.2, "PCK @0.1": 40.6}


def test_ablation_is_matched_by_its_config_name(board):
    (ranking,) = board(
        result(80.0, head="ViTSC", label="vitsc_table6_bilinear"),
        result(81.0, head="ViTSC"),
        papers=read_papers(),
    )
    assert [row.published["PCK @0.1"] for row in ranking.rows] == [81.8, 80.5]


def test_published_rankings():
    rankings = {(ranking.dataset, ranking.protocol): ranking for ranking in rank_papers(read_papers())}
    spair = rankings["spair71k", "published:bbox"]
    assert not any(row.measured or row.runs for ranking in rankings.values() for row in ranking.rows)
    assert not any(title.startswith("PCK") for title in tabulate(spair)[1])
    best = spair.rows[0]
    assert (best.head, best.resolution, best.published) == (
        "ViTSC",
        "448",
        {"PCK @0.01": 19.6, "PCK @0.05": 76.0, "PCK @0.1": 86.6},
    )
    assert best.groups["category", "bus"] == {"PCK @0.1": Spread(92.0)} and best.costs["params_head"] == 3.9
    (actr,) = [r for r in spair.rows if (r.head, r.backbone, r.resolution) == ("ACTR", "ibot_b16", "256")]
    assert actr.published == {"PCK @0.01": 4.3, "PCK @0.05": 42.0, "PCK @0.1": 62.1}
    assert actr.source == (  # each prints parts of it
        "ACTR poster, comparison; LPMFlow poster, comparison (ACTR*); ViTSC, Table 3"
    )
    (sfnet,) = [r for r in spair.rows if r.backbone == "SFNet"]
    assert sfnet.groups["occlusion", "both"] == {"PCK @0.1": Spread(26.9)}
    assert [row.variant for row in spair.rows if row.head == "GeoAware"] == ["extra training data", ""]
    assert {row.head for row in spair.rows} & {"DHPF", "Diffusion Hyperfeatures"} == {"DHPF", "Diffusion Hyperfeatures"}
    assert not any(mark in row.head for ranking in rankings.values() for row in ranking.rows for mark in "‡*_.")
    (deformed,) = [row for row in spair.rows if row.head == "Diffusion Hyperfeatures"]
    assert deformed.source == "ViTSC, Table 3 (D.Hyperfeat.)"
    assert len(rankings["pfwillow", "published:bbox"].rows) and len(rankings["pfwillow", "published:bbox-kp"].rows)


def test_a_dataset_with_scores_of_categories_alone_has_no_published_ranking():
    whole, category = [row for row in read_papers() if row["metric"] == "PCK"][:2]
    category = category | {"dataset": "new", "category": "bus", "difficulty": ""}
    assert [ranking.dataset for ranking in rank_papers([whole, category])] == [whole["dataset"]]
