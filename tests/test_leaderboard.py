"""The leaderboard from made-up result files: what shares a row or a ranking, what is side by side, what is refused."""

import csv
import json
from math import sqrt
from pathlib import Path

import pytest

from corrzoo.errors import ZooError
from corrzoo.leaderboard import main
from corrzoo.leaderboard.render import columns, to_csv, to_html, to_latex, to_markdown
from corrzoo.leaderboard.results import Spread, find_results, rank, rank_papers, read_papers, read_results

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ROOT / "benchmarks" / "papers.csv"


def result(pck=50.0, seed=0, **changes):
    """What `lightning test` writes, shortened; pck is that at 0.1, half of it at 0.05."""
    row = {"pairs": 5, "points": 40} | {f"pck@{a:g}/{w}": pck * a * 10 for a in (0.05, 0.1) for w in ("image", "point")}
    return {
        **{"label": "", "head": "Baseline", "options": {"stride": 8, "backbone_size": None}, "backbone": "dinov2_b14"},
        **{"weights": "pretrained", "dataset": "spair71k", "split": "test", "dataset_options": {}, "pairs": 10},
        **{"resolution": 224, "protocol": "default:bbox", "flaw": "", "alphas": [0.05, 0.1], "average": "image"},
        **{"params_backbone": 86_600_000, "params_head": 1, "seed": seed, "checkpoint": "best.ckpt", "device": "cpu"},
        **{"precision": "32-true", "versions": {"corrzoo": "0.1.0"}, "ms_per_pair": 10.0 + seed, "peak_memory_mb": 900},
        "trained": {"dataset": "spair71k", "batch_size": 16, "max_epochs": 10, "steps": 100 + seed, "seed": seed},
        "pck": {"pck@0.05": pck / 2, "pck@0.1": pck, "pck@0.1/image": pck},
        "breakdown": {"category": {"bus": row, "cat": row}, "scale": {"0": row, "2": row, ">0": row}, "viewpoint": {}},
    } | changes


@pytest.fixture
def board(tmp_path):
    """Write results into a study's folder and rank them."""

    def make(*results, papers=(), study="study"):
        for i, content in enumerate(results):
            path = tmp_path / study / f"{i}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return rank(read_results(find_results([tmp_path]), pytest.fail), papers)

    return make


# ---------------------------------------------------------------- what is one row


def test_runs_that_differ_in_their_seed_alone_are_one_row(board):
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
def test_whatever_else_differs_makes_another_row_of_the_ranking(board, change):
    (ranking,) = board(result(50, 0), result(54, 1, **change))
    assert [row.runs for row in ranking.rows] == [1, 1]


def test_the_same_run_twice_is_refused(board):
    with pytest.raises(ZooError, match=r"1\.json is .*0\.json again, seed 0: keep one, or label them"):
        board(result(), result(date="another day"))


def test_a_row_is_called_by_its_label_or_by_what_is_unusual_about_it(board):
    odd = {"stride": 4, "backbone_size": None}
    (ranking,) = board(
        result(60, 0),
        result(61, 1, resolution=448),
        result(50, 2, options=odd),
        result(40, 3, label="floor", options=odd),
    )
    assert [row.variant for row in ranking.rows] == ["", "", "stride=4", "floor"]


def test_two_budgets_are_told_apart(board):
    learnt = {"dataset": "spair71k", "batch_size": 16, "max_epochs": 20, "steps": 200, "seed": 0}
    (ranking,) = board(result(60), result(70, trained=learnt, device="a GPU"))
    assert [row.variant for row in ranking.rows] == ["max_epochs=20", "max_epochs=10"]
    assert columns(ranking)[-1].title == "device"


def test_what_was_learnt_from(board):
    (ranking,) = board(
        result(60),
        result(50, trained=None, checkpoint=None),
        result(40, trained=None, label="an old checkpoint does not say"),
    )
    assert [row.trained for row in ranking.rows] == ["spair71k", "nothing", ""]


def test_the_network_image_is_what_the_head_resizes_to(board):
    (ranking,) = board(
        result(60, options={"backbone_size": 256}), result(50, resolution=[224, 320]), result(40, resolution=[96, 96])
    )
    assert [row.resolution for row in ranking.rows] == ["256", "224x320", "96"]


def test_files_from_before_labels_and_training_data_are_read(board):
    old = {
        k: v for k, v in result(checkpoint=None).items() if k not in ("label", "trained", "dataset_options", "average")
    }
    (ranking,) = board(old)
    assert (ranking.rows[0].trained, ranking.rows[0].variant, ranking.options) == ("nothing", "", "")


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
def test_what_cannot_be_compared_is_ranked_apart(board, change):
    one, other = board(result(50, 0), result(54, 0, **change))
    assert len(one.rows) == len(other.rows) == 1


def test_runs_on_drawings_of_different_seeds_are_one_row(board):
    learnt = [{"dataset": "synthetic", "options": {"length": n, "seed": {"trn": s}}} for s, n in enumerate((8, 8, 9))]
    (ranking,) = board(*(result(50, s, trained=trained) for s, trained in enumerate(learnt)))
    assert sorted(row.runs for row in ranking.rows) == [1, 2]


def test_what_other_splits_were_given_does_not_matter(board):
    lengths = [{"trn": 800, "test": 10}, {"trn": 2400, "val": 5, "test": 10}, {"test": 10}]
    (ranking,) = board(*(result(50, s, dataset_options={"length": length}) for s, length in enumerate(lengths)))
    assert ranking.options == '{"length": 10}' and ranking.rows[0].runs == 3
    (unsaid,) = board(result(dataset_options={"length": {"trn": 800}}), study="unsaid")[1:]
    assert unsaid.options == ""
    (apart,) = [r for r in board(result(dataset_options={"noise": {"blur": 2}}), study="noise") if r.study == "noise"]
    assert apart.options == '{"noise": {"blur": 2}}'


def test_copies_of_a_dataset_with_other_images_are_ranked_apart_and_named(board):
    """CUB-200-2011 whole, and cut to crops: the same number of pairs, other images."""
    crops = {"dataset": "cub", "dataset_title": "cub (100 species, crops)", "fingerprint": "a"}
    whole = {"dataset": "cub", "dataset_title": "cub", "fingerprint": "b"}
    rankings = board(result(**crops), result(seed=1, **crops), result(**whole))
    assert [(ranking.dataset, ranking.rows[0].runs) for ranking in rankings] == [
        ("cub", 1),
        ("cub (100 species, crops)", 2),
    ]


def test_studies_are_ranked_apart(board):
    board(result(50), study="a")
    assert [ranking.study for ranking in board(result(54), study="b")] == ["a", "b"]


def test_a_ranking_of_two_versions_is_refused(board):
    with pytest.raises(ZooError, match=r"0\.json is of corrzoo 0\.1\.0 and .*1\.json of 0\.2\.0: measure again"):
        board(result(seed=0), result(seed=1, versions={"corrzoo": "0.2.0"}))


def test_the_headline_ranks(board):
    one, other = result(head="A"), result(head="B")
    one["pck"], other["pck"] = {"pck@0.05": 30.0, "pck@0.1": 40.0}, {"pck@0.05": 10.0, "pck@0.1": 60.0}
    (ranking,) = board(one, other)
    assert ranking.headline == "PCK @0.1" and [row.head for row in ranking.rows] == ["B", "A"]


def test_groups_are_averaged_over_the_seeds(board):
    (ranking,) = board(result(50, 0), result(60, 1))
    assert ranking.rows[0].groups == {
        group: {"PCK @0.05": Spread(27.5, sqrt(12.5)), "PCK @0.1": Spread(55.0, sqrt(50))}
        for group in (("category", "bus"), ("category", "cat"), ("scale", "easy"), ("scale", "hard"))
    }


def test_label_transfer_is_ranked_by_its_own_measures(board):
    scores = {"lt_acc_polygon": 88.0, "iou_polygon": 60.0, "lt_acc_mask": 87.0, "iou_mask": 61.0}
    how = {"protocol": "label-transfer", "alphas": [], "flaw": None, "dataset": "caltech101", "label_transfer": scores}
    one = result(breakdown={"category": {"ant": {"pairs": 15} | scores}}, **how)
    del one["pck"]
    pck, transfer = sorted(board(one, result()), key=lambda ranking: ranking.dataset, reverse=True)
    assert transfer.measures == ["LT-ACC polygon", "IoU polygon", "LT-ACC mask", "IoU mask"]
    assert transfer.headline == "IoU mask" and transfer.rows[0].measured["IoU mask"].mean == 61.0
    assert transfer.rows[0].groups["category", "ant"]["LT-ACC polygon"] == Spread(88.0)
    assert "| IoU mask |" in to_markdown([transfer]) and "IoU" not in to_markdown([pck])


# ---------------------------------------------------------------- published numbers


def test_a_published_number_stands_beside_the_measured_one_of_the_same_thing(board):
    (ranking,) = board(result(80.0), papers=read_papers(PAPERS))
    (row,) = ranking.rows
    assert row.published == {"PCK @0.01": 7.0, "PCK @0.05": 58.6, "PCK @0.1": 78.2} and row.source == "vitsc, Table 1"
    assert row.difference("PCK @0.1") == pytest.approx(1.8) and row.difference("PCK @0.05") == pytest.approx(40 - 58.6)
    assert row.difference("PCK @0.01") is None
    titles = [column.title for column in columns(ranking)]
    assert {"PCK @0.1", "published @0.1", "difference @0.1"} <= set(titles)


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
    ],
    ids=lambda change: next(iter(change)),
)
def test_of_another_thing_none_does(board, change):
    (ranking,) = board(result(80.0, **change), papers=read_papers(PAPERS))
    assert ranking.rows[0].published == {} and ranking.rows[0].difference("PCK @0.1") is None
    assert not any(column.title.startswith(("published", "difference")) for column in columns(ranking))


def test_an_untrained_model_is_compared_with_an_untrained_one(board):
    (ranking,) = board(result(40.0, trained=None, checkpoint=None), papers=read_papers(PAPERS))
    assert ranking.rows[0].published == {"PCK @0.01": 1.3, "PCK @0.05": 20.2, "PCK @0.1": 40.6}


def test_an_ablation_is_known_by_the_name_of_its_config(board):
    (ranking,) = board(
        result(80.0, head="ViTSC", label="vitsc_table6_bilinear"),
        result(81.0, head="ViTSC"),
        papers=read_papers(PAPERS),
    )
    assert [row.published["PCK @0.1"] for row in ranking.rows] == [81.8, 80.5]


def test_published_rankings_hold_nothing_measured():
    rankings = {(ranking.dataset, ranking.protocol): ranking for ranking in rank_papers(read_papers(PAPERS))}
    spair = rankings["spair71k", "published:bbox"]
    assert not any(row.measured or row.runs for ranking in rankings.values() for row in ranking.rows)
    assert not any(column.title.startswith("PCK") for column in columns(spair))
    best = spair.rows[0]
    assert (best.head, best.resolution, best.published) == (
        "ViTSC",
        "448",
        {"PCK @0.01": 19.6, "PCK @0.05": 76.0, "PCK @0.1": 86.6},
    )
    assert best.groups["category", "bus"] == {"PCK @0.1": Spread(92.0)} and best.costs["params_head"] == 3.9
    (actr,) = [r for r in spair.rows if (r.head, r.backbone, r.resolution) == ("ACTR", "ibot_b16", "256")]
    assert actr.published == {"PCK @0.01": 4.3, "PCK @0.05": 42.0, "PCK @0.1": 62.1}  # three papers print parts of it
    (sfnet,) = [r for r in spair.rows if r.backbone == "SFNet"]
    assert sfnet.groups["occlusion", "both"] == {"PCK @0.1": Spread(26.9)}
    assert len(rankings["pfwillow", "published:bbox"].rows) and len(rankings["pfwillow", "published:bbox-kp"].rows)


# ---------------------------------------------------------------- formats


def test_markdown_leaves_empty_what_was_not_measured(board):
    text = to_markdown(board(result(80.0, 0), result(84.0, 1), result(60.0, head="GSF", ms_per_pair=None)))
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    names, _, first, second = table
    assert text.startswith("### study\n\nspair71k test, 10 pairs, default:bbox\n")
    assert dict(zip(names, first, strict=True))["PCK @0.1"] == "82.0 ± 2.8"
    assert dict(zip(names, second, strict=True)) == {
        **{"#": "2", "head": "GSF", "backbone": "dinov2_b14", "trained on": "spair71k", "px": "224", "runs": "1"},
        **{"PCK @0.05": "30.0", "PCK @0.1": "60.0", "ms / pair": "", "head, M": "0.00"},
    }


def test_markdown_folds_a_long_table(board):
    short, long = (to_markdown(board(*(result(50.0 + k, label=f"row {k}") for k in range(n)))) for n in (12, 13))
    assert "<details>" not in short and short.count("| row ") == 12
    assert "<details><summary>spair71k test, 10 pairs, default:bbox: 13 rows</summary>\n\n| # |" in long
    assert long.count("| row ") == 13 and long.rstrip().endswith("|\n\n</details>")


def test_csv_has_every_number_once(board):
    rows = list(csv.DictReader(to_csv(board(result(80.0), papers=read_papers(PAPERS))).splitlines()))
    (whole,) = [row for row in rows if row["measure"] == "PCK @0.1" and not row["group"]]
    assert (whole["measured"], whole["deviation"], whole["published"], whole["place"]) == ("80.0", "", "78.2", "1")
    assert float(whole["difference"]) == pytest.approx(1.8)
    assert {(row["group"], row["level"]) for row in rows} == {
        *(("", ""), ("category", "bus"), ("category", "cat"), ("scale", "easy"), ("scale", "hard"))
    }
    assert len(rows) == 2 * 5


def test_latex_escapes_and_marks_the_best(board):
    text = to_latex(board(result(80.0), result(60.0, label="50 % & more")))
    assert "\\textbf{80.0}" in text and "\\textbf{60.0}" not in text and "50 \\% \\& more" in text
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 1
    body = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len({line.replace("\\&", "").count("&") for line in body}) == 1


def test_html_is_one_page_and_escapes_what_files_say(board):
    page = to_html(board(result(80.0, label="<script>alert(1)</script></script>")))
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("</script>") == 2 and "{{" not in page
    assert "http" not in page.replace("http-equiv", "")


# ---------------------------------------------------------------- the command


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder like the repository's, with one result and a README that has the markers."""
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "benchmarks" / "results" / "study"
    study.mkdir(parents=True)
    (study / "one.json").write_text(json.dumps(result(80.0)))
    (tmp_path / "benchmarks" / "papers.csv").write_text(PAPERS.read_text())
    (tmp_path / "README.md").write_text("before\n<!-- leaderboard -->\nold\n<!-- /leaderboard -->\nafter\n")
    return tmp_path


def test_it_writes_and_checks(project, capsys):
    main([])
    readme = (project / "README.md").read_text()
    assert readme.startswith("before\n<!-- leaderboard -->\n### study\n") and "\nold\n" not in readme
    assert readme.endswith("<!-- /leaderboard -->\nafter\n") and "| 78.2 |" in readme and "| +1.8 |" in readme
    assert {path.name for path in (project / "docs").iterdir()} == {
        f"leaderboard.{kind}" for kind in ("html", "csv", "tex")
    }
    assert leaves(["--check"]) == 0
    (project / "benchmarks" / "results" / "study" / "one.json").write_text(json.dumps(result(79.0)))
    with pytest.raises(ZooError, match=r"docs/leaderboard\.html, .*README\.md: not what the result files say"):
        main(["--check"])
    main([])
    assert leaves(["--check"]) == 0
    (project / "docs" / "leaderboard.csv").write_text("touched\n")
    with pytest.raises(ZooError, match=r"^docs/leaderboard\.csv: not what"):
        main(["--check"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it holds a list"),
        ("{}", "it has no 'head'"),
        (json.dumps(result() | {"pck": {"pck@0.05": 1.0}}), "pck@0.1"),
        (json.dumps(result() | {"pck": {"pck@0.05": "", "pck@0.1": 1.0}}), "its scores are no numbers"),
        (json.dumps(result() | {"breakdown": {"category": {"bus": {"pairs": 5}}}}), "pck@0.05/image"),
        (json.dumps(result() | {"breakdown": {"scale": {"9": {}}}}), "out of range"),
        (json.dumps(result() | {"pck": {"pck@0.05": float("nan"), "pck@0.1": 1.0}}), "it says NaN"),
        (json.dumps(result() | {"alphas": []}), "out of range"),
        *((json.dumps(result() | {key: "word"}), "") for key in ("versions", "options", "trained", "params_head")),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_a_corrupt_file_is_named_and_skipped(project, capsys, content, why):
    bad = project / "benchmarks" / "results" / "study" / "bad.json"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    main([])
    said = capsys.readouterr().err
    assert said.startswith("warning: benchmarks/results/study/bad.json is skipped") and why in said
    assert len(said.strip().splitlines()) == 1
    assert leaves(["--check"]) == 1  # though every file is what it would be


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda p: (p / "benchmarks/results/study/one.json").unlink(), "no result files under benchmarks/results:"),
        (lambda p: (p / "benchmarks/results/study/one.json").write_text("{}"), "none of the files is a result file"),
        (
            lambda p: (p / "benchmarks/papers.csv").unlink(),
            r"no published numbers at benchmarks/papers\.csv: give --papers",
        ),
        (lambda p: (p / "benchmarks/papers.csv").write_text("paper,table\na,b\n"), "papers.csv has no column 'method'"),
        (
            lambda p: (p / "benchmarks/papers.csv").write_text(PAPERS.read_text().replace("35.6,%", "many,%")),
            "papers.csv: the value 'many' of actr_poster, comparison is no number",
        ),
        (lambda p: (p / "README.md").write_text("no markers"), r"README\.md has no lines <!-- leaderboard -->"),
        (lambda p: (p / "README.md").unlink(), r"README\.md has no lines <!-- leaderboard -->"),
    ],
)
def test_bad_input_is_one_line(project, break_it, said):
    break_it(project)
    with pytest.raises(ZooError, match=said) as error:
        main([])
    assert "\n" not in str(error.value) and not (project / "docs").exists()


def test_ones_own_runs_leave_the_readme_alone(project):
    before = (project / "README.md").read_text()
    main(["benchmarks/results", "--papers", "", "--out", "board"])
    assert (project / "README.md").read_text() == before and (project / "board" / "leaderboard.html").is_file()
    main(["benchmarks/results/study/one.json", "--readme", "README.md", "--out", "board"])
    assert "### study" in (project / "README.md").read_text()


def leaves(args):
    """The exit code of a command that says nothing."""
    with pytest.raises(SystemExit) as leaving:
        main(args)
    return leaving.value.code
