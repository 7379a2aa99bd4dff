"""papers.csv against the texts of the papers: how many numbers, in which order, and what they average to."""

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from corrzoo.heads import list_heads
from corrzoo.leaderboard.papers import PAPERS
from corrzoo.leaderboard.rows import SUPERVISION

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "src" / "corrzoo" / "zoo_configs"
CONFIGS = {path.stem for path in RECIPES.rglob("*.yaml")}
CONFIGS |= {f"{path.parent.name}_{path.stem}" for path in RECIPES.glob("ablation/*/*.yaml")}
for page in (ROOT / "docs" / "heads").glob("*.md"):  # values of one option
    CONFIGS |= set(re.findall(r"^\| (\w+) \| `--model", page.read_text(), re.M))
with PAPERS.open() as file:
    ROWS = list(csv.DictReader(file))

COUNTS = {
    # counted in the texts by hand: rows times columns, less the dashes and what papers.md leaves out
    ("actr_poster", "comparison"): 14 * 4 - 3,
    ("actr_poster", "per category"): 11 * 19,
    ("actr_poster", "PF-WILLOW"): 8 * 4 - 6,
    ("actr_poster", "ablation"): 1 + 7 * 2,
    ("cats_readme", "results"): 2 * 4,
    ("gsf", "Table 1"): 12 * 8 - 5 - 4,
    ("gsf", "Table 2"): 8 * 15,
    ("gsf", "Table 3a"): 4,
    ("gsf", "Table 3b"): 5,
    ("lpmflow_poster", "comparison"): 11 * 11 - 9 - 1,
    ("lpmflow_poster", "per category"): 11 * 19 - 5,
    ("lpmflow_poster", "ablation of modules"): 4 * 2 - 1 - 1,
    ("lpmflow_poster", "ablation of LARL"): 1 + 3 * 2,
    ("lpmflow_poster", "ablation of PFSR"): 1 + 3 * 2,
    ("lpmflow_poster", "ablation of MMFI"): 1 + 3 * 2,
    ("lpmflow_supplement", "Table 1"): 1 + 4 * 2,
    ("lpmflow_supplement", "Table 2"): 11 * 19,
    ("lpmflow_supplement", "section 2.2"): 2,
    ("lpmflow_supplement", "section 2.3"): 5 + 6,
    ("vitsc", "Table 1"): 4 * 6,
    ("vitsc", "Table 2"): 4 * 3,
    ("vitsc", "Table 3"): 18 * 9 - 47,
    ("vitsc", "Table 4"): 4 * 3,
    ("vitsc", "Table 5"): 4 * 3,
    ("vitsc", "Table 6"): 4 * 3,
    ("vitsc", "Table 7"): 2 * 3,
    ("vitsc", "Table 8"): 5 * 3,
    ("vitsc", "Table 9"): 9 * 19 - 2,
    ("vitsc", "Table 10"): 11 * 5,
}


def find(**wanted):
    """The values of the rows with these cells."""
    return [float(row["value"]) for row in ROWS if all(row[key] == value for key, value in wanted.items())]


def test_every_table_has_all_its_numbers():
    assert Counter((row["paper"], row["table"]) for row in ROWS) == COUNTS


def test_cells_are_what_the_leaderboard_expects():
    for row in ROWS:
        assert re.fullmatch(r"\d+(\.\d+)?", row["value"])
        assert row["head"] in ("", *list_heads())
        assert row["unit"] in ("%", "fraction", "M", "GB", "ms") and bool(row["alpha"]) == row["metric"].startswith(
            "PCK"
        )
        assert row["dataset"] in ("", "spair71k", "pfpascal", "pfwillow", "caltech101")
        assert row["threshold"] in ("", "img", "bbox", "bbox-kp")
        assert row["config"] in CONFIGS | {""}, row["config"]
        assert row["supervision"] in (*SUPERVISION, "")
        if row["unit"] == "%":
            assert 0 <= float(row["value"]) <= 100


def test_no_number_is_there_twice():
    cells = [tuple(value for key, value in row.items() if key not in ("value", "note")) for row in ROWS]
    assert len(cells) == len(set(cells))


@pytest.mark.parametrize("paper", sorted({paper for paper, _ in COUNTS} - {"cats_readme"}))
def test_each_row_of_a_table_stands_in_the_text_as_it_is(paper, shared):
    """A method's numbers follow each other in one line of the text, and nothing else is between the first and the last
    of them but what the table's other columns hold."""
    lines = (shared / "papers" / f"{paper}.txt").read_text().splitlines()
    numbers = [re.findall(r"\d+(?:\.\d+)?", line) for line in lines]
    if paper == "lpmflow_poster":  # many decimal points are lost in its text
        numbers = [[number.replace(".", "") for number in line] for line in numbers]
    methods = defaultdict(list)
    for row in ROWS:
        if row["paper"] == paper and not row["note"].startswith("printed"):
            key = ("table", "label", "ablation") if row["metric"] != "PCK drop" else ("table", "ablation")
            backbone = row["backbone"] if row["table"] in ("comparison", "Table 1", "Table 8") else ""
            value = row["value"].replace(".", "") if paper == "lpmflow_poster" else row["value"]
            methods[*(row[k] for k in key), backbone].append(value)
    for key, values in methods.items():
        assert any(in_order(values, line) for line in numbers), (key, values)


def in_order(values, line):
    rest = iter(line)
    return all(any(value == number for number in rest) for value in values)


ALIASES = {
    "GeoAware-SC": "GeoAware",
    "NC-Net": "NCNet",
    "TransforM.": "TransforMatcher",
    "MMNet": "MMNet-FCN",
    "D.Hyperfeat.": "Diffusion Hyperfeatures",
    "Ours w/ResNet": "GSF",
    "Ours w/SFNet": "GSF",
}


def test_a_method_has_one_name_and_its_label_is_kept():
    """The paper's marks are for backbone, resolution and variant, which have columns of their own."""
    marks = {}
    for row in ROWS:
        plain = re.sub("_[hls]$|[‡*]$", "", row["label"])
        assert row["method"] == ALIASES.get(plain, plain)
        assert row["head"] in ("", row["method"])
        if row["label"] != plain:
            marks.setdefault((row["paper"], row["label"]), set()).add(
                (row["backbone"], row["resolution"], row["variant"])
            )
    assert {backbone for (paper, label), facts in marks.items() for backbone, *_ in facts if label[-1] == "‡"} == {
        *("ibot_b16", "dinov2_b14")
    }
    for (paper, label), facts in marks.items():
        for backbone, resolution, variant in facts:
            assert backbone and (resolution or label[-1] in "‡*"), (paper, label)
            assert variant == ("extra training data" if label == "GeoAware-SC*" else "")


def test_merged_labels_are_the_same_method():
    """Numbers that two papers print under two labels are equal."""
    spair = {"dataset": "spair71k", "threshold": "bbox", "alpha": "0.1", "difficulty": "", "ablation": ""}
    for paper, table, label, other_paper, other_table, other in (
        ("lpmflow_supplement", "Table 2", "TransforMatcher", "vitsc", "Table 9", "TransforM."),
        ("actr_poster", "per category", "MMNet", "actr_poster", "comparison", "MMNet-FCN"),
        ("actr_poster", "per category", "CATs‡", "lpmflow_supplement", "Table 2", "CATs*"),
        ("actr_poster", "per category", "VAT‡", "actr_poster", "comparison", "VAT"),
        ("lpmflow_poster", "per category", "NC-Net", "lpmflow_supplement", "Table 2", "NC-Net"),
    ):
        one = find(paper=paper, table=table, label=label, category="", **spair)
        assert len(one) == 1 and one[0] in find(paper=other_paper, table=other_table, label=other, category="", **spair)


def test_supervision_is_one_of_a_method_unless_it_is_tested_without_training():
    stated = defaultdict(set)
    for row in ROWS:
        stated[row["method"]].add(row["supervision"])
    assert stated.pop("Baseline") == {"keypoints", "none"}
    assert all(len(kinds) == 1 for kinds in stated.values())
    assert {method for method, kinds in stated.items() if kinds == {"none"}} == {"DINOv2", "DIFT", "SD-DINO"}
    assert stated["GSF"] == stated["NCNet"] == {"weak"} and stated["CATs"] == {"keypoints"} and stated["DHPF"] == {""}


@pytest.mark.parametrize("paper", ["actr_poster", "lpmflow_supplement", "vitsc"])
def test_the_categories_average_to_all(paper):
    """`all` counts each pair once, the mean here each category: the categories have much the same number of pairs."""
    tables = defaultdict(dict)
    for row in ROWS:
        if (
            row["paper"] == paper
            and row["table"] in ("per category", "Table 2", "Table 9")
            and row["dataset"] == "spair71k"
        ):
            if row["category"] or row["table"] != "Table 2" or paper != "vitsc":
                tables[row["label"], row["backbone"], row["resolution"]][row["category"]] = float(row["value"])
    whole = [row for row in tables.values() if len(row) == 19]
    assert len(whole) == {"actr_poster": 11, "lpmflow_supplement": 11, "vitsc": 8}[paper]
    for row in whole:
        mean = sum(value for category, value in row.items() if category) / 18
        assert mean == pytest.approx(row[""], abs=1.0)


def test_papers_agree_where_they_print_the_same_thing():
    """ACTR's numbers per category stand in three papers; ViTSC's misprints one cell."""
    three = [
        find(paper=paper, table=table, head="ACTR", resolution=res, dataset="spair71k", backbone="ibot_b16")
        for paper, table, res in (("actr_poster", "per category", "256"), ("lpmflow_supplement", "Table 2", ""))
    ]
    assert three[0] == three[1] and len(three[0]) == 19
    vitsc = find(paper="vitsc", table="Table 9", label="ACTR")
    assert [(a, b) for a, b in zip(three[0], vitsc, strict=True) if a != b] == [(65.1, 65.0)]


def test_drops_are_differences():
    whole = {"actr_poster": 62.1, "lpmflow_poster": 65.6, "lpmflow_supplement": 65.6}
    drops = [row for row in ROWS if row["metric"] == "PCK drop"]
    assert len(drops) == 7 + 3 * 3 + 3 + 4
    for row in drops:
        same = {key: row[key] for key in ("paper", "table", "label", "ablation")}
        (pck,) = find(**same, metric="PCK")
        assert whole[row["paper"]] - pck == pytest.approx(float(row["value"]), abs=0.01)


def test_spot_rows():
    spair = {"dataset": "spair71k", "threshold": "bbox", "alpha": "0.1", "category": "", "difficulty": ""}
    assert find(paper="vitsc", table="Table 3", label="ViTSC", **spair) == [81.8]
    assert find(paper="vitsc", table="Table 3", label="ViTSC_h", dataset="pfwillow") == [47.2, 72.6, 84.9]
    assert find(paper="vitsc", table="Table 1", backbone="mae_b16", supervision="none") == [0.1, 2.6, 8.1]
    assert find(paper="vitsc", table="Table 10", label="ViTSC_l", metric="time") == [16.6]
    assert find(paper="gsf", table="Table 1", label="Ours w/SFNet", dataset="caltech101") == [0.89, 0.69]
    assert find(paper="gsf", table="Table 2", label="HPF", difficulty="occlusion both") == [21.8]
    assert find(paper="gsf", head="GSF", ablation="w/o pruning") == [25.1]
    assert find(paper="actr_poster", label="ACTR_h", table="comparison") == [65.4, 82.0, 93.5, 96.7]
    assert find(paper="actr_poster", table="PF-WILLOW", label="ACTR", threshold="bbox-kp") == [52.6, 79.9]
    assert find(paper="lpmflow_poster", table="comparison", head="LPMFlow")[-4:] == [93.9, 178.9, 3.8, 85.7]
    assert find(paper="lpmflow_supplement", ablation="top K = 16") == [64.7]
    assert find(paper="lpmflow_supplement", label="LPMFlow*", category="bus") == [75.4]
