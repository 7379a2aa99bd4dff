"""Rankings of result files: which results share a row, which share a ranking, and how rows are named."""

from math import sqrt

import pytest
from made_up import result

from corrzoo.errors import ZooError
from corrzoo.leaderboard.render import heading_of, in_words, tabulate, to_markdown
from corrzoo.leaderboard.rows import Spread

# ---------------------------------------------------------------- what is one row


def test_runs_that_differ_only_in_the_seed_share_a_row(board):
    (ranking,) = board(result(50, 0), result(54, 1), result(58, 2), result(70, 0, head="ACTR"))
    first, second = ranking.rows
    assert (first.head, first.runs, first.measured["PCK @0.1"]) == ("ACTR", 1, Spread(70.0, None))
    assert (second.runs, second.measured["PCK @0.1"].mean, second.measured["PCK @0.1"].deviation) == (
        3,
        54.0,
        pytest.approx(sqrt(32 / 2)),
    )
    assert second.measured["PCK @0.05"].mean == 27.0 and str(second.measured["PCK @0.05"]) == "27.0 ± 2.0"
    assert second.costs == {"ms_per_pair": 11.0, "peak_memory_mb": 900, "params_head": 1e-6, "params_backbone": 86.6}


def test_a_switch_that_is_off_may_be_absent(board):
    """Files of older versions lack the options that came later. Zero is a value, not off."""
    options = {"stride": 8, "backbone_size": None}
    runs = result(50, 0, options=options), result(54, 1, options=options | {"later": False})
    (ranking,) = board(*runs, result(58, 2, options=options | {"later": 0}))
    assert [(row.runs, row.variant) for row in ranking.rows] == [(1, "later=0"), (2, "later=False")]


@pytest.mark.parametrize(
    "change",
    [
        {"label": "ablation"},
        {"backbone": "dinov2_s14"},
        {"resolution": 448},
        {"precision": "bf16-mixed"},
        {"device": "a GPU"},
        {"options": {"stride": 4, "backbone_size": None}},
        {"trained": None, "checkpoint": None},
        {"trained": {"dataset": "spair71k", "batch_size": 32, "max_epochs": 10, "steps": 100, "seed": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_difference_gives_a_separate_row(board, change):
    (ranking,) = board(result(50, 0), result(54, 1, **change))
    assert [row.runs for row in ranking.rows] == [1, 1]


def test_a_duplicate_run_is_an_error(board):
    with pytest.raises(ZooError, match=r"1\.json repeats .*0\.json, seed 0: keep one, or label them"):
        board(result(), result(date="another day"))


def test_a_variant_is_named_by_its_label_or_its_unusual_options(board):
    odd = {"stride": 4, "backbone_size": None}
    (ranking,) = board(
        result(60, 0),
        result(61, 1, resolution=448),
        result(50, 2, options=odd),
        result(40, 3, label="floor", options=odd),
    )
    assert [row.variant for row in ranking.rows] == ["", "", "stride=4", "floor"]


def test_training_budgets_give_separate_rows(board):
    training = {"dataset": "spair71k", "batch_size": 16, "max_epochs": 20, "steps": 200, "seed": 0}
    (ranking,) = board(result(60), result(70, trained=training, device="a GPU"))
    assert [row.variant for row in ranking.rows] == ["max_epochs=20", "max_epochs=10"]
    shared, titles, _ = tabulate(ranking)
    assert titles[-1] == "device" and not any("device" in phrase for phrase in shared)


def test_pairs_seen_give_separate_rows_and_a_column(board):
    training = [
        {"dataset": "cub", "batch_size": 16, "max_steps": n // 16, "pairs_seen": n, "seed": s}
        for n in (800, 10_000)
        for s in (0, 1)
    ]
    (ranking,) = board(*(result(50 + t["pairs_seen"] / 1000, t["seed"], trained=t) for t in training))
    assert [(row.pairs_seen, row.runs, row.variant) for row in ranking.rows] == [(10_000, 2, ""), (800, 2, "")]
    assert "| pairs seen |" in to_markdown([ranking]) and "| 10,000 |" in to_markdown([ranking])


def test_training_dataset_is_empty_if_none_or_unknown(board):
    (ranking,) = board(
        result(60),
        result(50, trained=None, checkpoint=None),
        result(40, trained=None, label="a checkpoint without training data"),
    )
    rows = {row.measured["PCK @0.1"].mean: (row.trained, row.supervision) for row in ranking.rows}
    assert rows == {60: ("spair71k", "keypoints"), 50: ("", "none"), 40: ("", "keypoints")}


def test_a_released_checkpoint_is_not_training_free(board):
    """Its dataset is unknown, as is that of a training with loaders of one's own."""
    released = {"dataset": None, "size": 224, "source": "model_best.pth"}
    others = [released | {"source": "other.pth"}, {"dataset": None, "before": "unknown data"}]
    changes = dict(checkpoint=None)
    (ranking,) = board(*(result(60 - i, trained=t, **changes) for i, t in enumerate([released, *others])))
    assert [(row.supervision, row.trained, row.variant) for row in ranking.rows] == [
        ("keypoints", "", "source=model_best.pth"),
        ("keypoints", "", "source=other.pth"),
        ("keypoints", "(after unknown data)", ""),
    ]
    (ranking,) = board(result(head="NCNet", trained=released, **changes), study="weak")[1:]
    assert ranking.rows[0].supervision == "weak" and "None" not in to_markdown([ranking])


def test_each_kind_of_supervision_is_ranked_separately(board):
    (ranking,) = board(
        result(60, head="GSF"),
        result(50),
        result(70, head="CATs", supervision="weak"),
        result(55, head="ACTR"),
        result(90, trained=None, checkpoint=None),
    )
    assert [(row.supervision, row.place, row.head) for row in ranking.rows] == [
        ("keypoints", 1, "ACTR"),
        ("keypoints", 2, "Baseline"),
        ("weak", 1, "CATs"),
        ("weak", 2, "GSF"),
        ("none", 1, "Baseline"),
    ]
    text = to_markdown([ranking])
    assert "| supervision |" in text and "| training-free (zero-shot) |" in text


def test_measures_come_from_the_result_file(board):
    measures = [["@0.1", "pck@0.1/point", "pck@0.1"], ["Error", "epe", "epe_mean"]]
    row = {"pairs": 3, "pck@0.1/point": 30.0, "epe": 7.0}
    groups = {"category": {"bus": row}, "geometry": {"ambiguous": row, "other": row}}
    scores = {"pck@0.1": 40.0, "epe_mean": 5.0}
    (ranking,) = board(result(measures=measures, breakdown=groups, alphas=[]) | {"pck": scores})
    assert ranking.measures == ["PCK @0.1", "Error"]
    assert ranking.rows[0].measured == {"PCK @0.1": Spread(40.0), "Error": Spread(5.0)}
    groups = ranking.rows[0].groups
    assert set(groups) == {("category", "bus"), ("geometry", "ambiguous"), ("geometry", "other")}
    assert groups["geometry", "ambiguous"] == {"PCK @0.1": Spread(30.0), "Error": Spread(7.0)}


def test_resolution_is_the_size_of_the_backbone_input(board):
    (ranking,) = board(
        result(60, options={"backbone_size": 256}),
        result(55, options={"resize": 320}),  # the option's name in corrzoo 0.1.0
        result(50, resolution=[224, 320]),
        result(40, resolution=[96, 96]),
    )
    assert [row.resolution for row in ranking.rows] == ["256", "320", "224x320", "96"]


def test_old_files_without_measures_have_pck_at_their_alphas(board):
    """A protocol that averages over points has the mean over points in its breakdown as well."""
    row = {"pairs": 5, "pck@0.1/image": 20.0, "pck@0.1/point": 30.0}
    old = {"alphas": [0.1], "average": "category-point", "breakdown": {"category": {"bus": row}}}
    (ranking,) = board(result(50.0, **old))
    assert ranking.rows[0].measured == {"PCK @0.1": Spread(50.0)}
    assert ranking.rows[0].groups == {("category", "bus"): {"PCK @0.1": Spread(30.0)}}


def test_old_files_without_label_and_training_data_are_read(board):
    old = {
        k: v for k, v in result(checkpoint=None).items() if k not in ("label", "trained", "dataset_options", "average")
    }
    (ranking,) = board(old)
    assert (ranking.rows[0].trained, ranking.rows[0].supervision, ranking.rows[0].variant) == ("", "none", "")
    assert ranking.options == {}


# ---------------------------------------------------------------- what is one ranking


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "cats:bbox"},
        {"protocol": "default:img"},
        {"alphas": [0.1]},
        {"dataset": "pfpascal"},
        {"split": "val"},
        {"pairs": 11},
        {"dataset_options": {"seed": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_results_that_are_not_comparable_are_in_separate_rankings(board, change):
    one, other = board(result(50, 0), result(54, 0, **change))
    assert len(one.rows) == len(other.rows) == 1


def test_synthetic_training_pairs_of_different_seeds_share_a_row(board):
    training = [{"dataset": "synthetic", "options": {"length": n, "seed": {"trn": s}}} for s, n in enumerate((8, 8, 9))]
    (ranking,) = board(*(result(50, s, trained=trained) for s, trained in enumerate(training)))
    assert sorted(row.runs for row in ranking.rows) == [1, 2]


def test_options_of_other_splits_are_ignored(board):
    lengths = [{"trn": 800, "test": 10}, {"trn": 2400, "val": 5, "test": 10}, {"test": 10}]
    (ranking,) = board(*(result(50, s, dataset_options={"length": length}) for s, length in enumerate(lengths)))
    assert ranking.options == {"length": 10} and ranking.rows[0].runs == 3
    (unknown,) = board(result(dataset_options={"length": {"trn": 800}}), study="unknown")[1:]
    assert unknown.options == {}
    (apart,) = [r for r in board(result(dataset_options={"noise": {"blur": 2}}), study="noise") if r.study == "noise"]
    assert apart.options == {"noise": {"blur": 2}} and heading_of(apart)[0] == "SPair-71k, noise blur 2"


def test_options_are_shown_as_words():
    assert in_words({"length": 400, "noise": {"blur": 2, "jpeg": 9}}) == "length 400, noise blur 2, jpeg 9"
    assert in_words({"leave_out": "category", "flip": True, "kinds": ["car", "duck"]}) == (
        "leave out category, flip, kinds car duck"
    )


def test_pfwillow_kinds_of_0_1_0_is_leave_one_category_out(board):
    kinds = {"kinds": "each in turn is tested, the others are learnt from"}
    training = {"dataset": "pfwillow_kinds", "options": kinds, "seed": 0}
    (ranking,) = board(result(dataset="pfwillow_kinds", dataset_options=kinds, trained=training))
    assert heading_of(ranking)[0] == "PF-WILLOW, leave-one-category-out"
    text = to_markdown([ranking])
    assert "| PF-WILLOW |" in text and "kinds" not in text and "{" not in text


def test_partial_copies_of_a_dataset_are_ranked_separately_under_their_titles(board):
    """CUB-200-2011 whole, and cut to crops: the same number of pairs, other images."""
    crops = {"dataset": "cub", "dataset_title": "cub (100 species, crops)", "fingerprint": "a"}
    whole = {"dataset": "cub", "dataset_title": "cub", "fingerprint": "b"}
    rankings = board(result(**crops), result(seed=1, **crops), result(**whole))
    assert [(ranking.dataset, ranking.rows[0].runs) for ranking in rankings] == [
        ("cub", 1),
        ("cub (100 species, crops)", 2),
    ]
    assert [heading_of(ranking)[0] for ranking in rankings] == ["CUB-200-2011", "CUB-200-2011 (100 species, crops)"]


def test_studies_are_ranked_separately(board):
    board(result(50), study="a")
    assert [ranking.study for ranking in board(result(54), study="b")] == ["a", "b"]


def test_mixed_versions_of_corrzoo_are_an_error(board):
    with pytest.raises(ZooError, match=r"0\.json is of corrzoo 0\.1\.0 and .*1\.json of 0\.2\.0: measure again"):
        board(result(seed=0), result(seed=1, versions={"corrzoo": "0.2.0"}))


def test_rows_are_ordered_by_the_headline_measure(board):
    one, other = result(head="A"), result(head="B")
    one["pck"], other["pck"] = {"pck@0.05": 30.0, "pck@0.1": 40.0}, {"pck@0.05": 10.0, "pck@0.1": 60.0}
    (ranking,) = board(one, other)
    assert ranking.headline == "PCK @0.1" and [row.head for row in ranking.rows] == ["B", "A"]


def test_breakdowns_are_averaged_over_seeds(board):
    (ranking,) = board(result(50, 0), result(60, 1))
    assert ranking.rows[0].groups == {
        group: {"PCK @0.05": Spread(27.5, sqrt(12.5)), "PCK @0.1": Spread(55.0, sqrt(50))}
        for group in (("category", "bus"), ("category", "cat"), ("scale", "easy"), ("scale", "hard"))
    }


def test_label_transfer_has_its_own_measures(board):
    scores = {"lt_acc_polygon": 88.0, "iou_polygon": 60.0, "lt_acc_mask": 87.0, "iou_mask": 61.0}
    how = {"protocol": "label-transfer", "alphas": [], "flaw": None, "dataset": "caltech101", "label_transfer": scores}
    titles = {"LT-ACC polygon": "lt_acc_polygon", "IoU polygon": "iou_polygon"}
    titles |= {"LT-ACC mask": "lt_acc_mask", "IoU mask": "iou_mask"}
    how["measures"] = [[title, key, key] for title, key in titles.items()]
    one = result(breakdown={"category": {"ant": {"pairs": 15} | scores}}, **how)
    del one["pck"]
    pck, transfer = sorted(board(one, result()), key=lambda ranking: ranking.dataset, reverse=True)
    assert transfer.measures == ["LT-ACC polygon", "IoU polygon", "LT-ACC mask", "IoU mask"]
    assert transfer.headline == "IoU mask" and transfer.rows[0].measured["IoU mask"].mean == 61.0
    assert transfer.rows[0].groups["category", "ant"]["LT-ACC polygon"] == Spread(88.0)
    assert "| IoU mask |" in to_markdown([transfer]) and "IoU" not in to_markdown([pck])
