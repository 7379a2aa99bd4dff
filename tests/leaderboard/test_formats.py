"""Rankings as Markdown, CSV and HTML."""

import csv

import pytest
from made_up import result

from corrzoo.data import list_datasets
from corrzoo.leaderboard.papers import read_papers
from corrzoo.leaderboard.render import WORDS, to_csv, to_html, to_markdown


def test_markdown_cell_is_empty_if_not_measured(board):
    text = to_markdown(board(result(80.0, 0), result(84.0, 1), result(60.0, head="GSF", ms_per_pair=None)))
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    names, _, first, second = table
    assert text.startswith(
        "### SPair-71k\n\nmeasured, study study, test split, 10 pairs, protocol default:bbox, "
        "trained on SPair-71k, 224 px, device: cpu\n"
    )
    assert dict(zip(names, first, strict=True))["PCK @0.1"] == "82.0 ± 2.8"
    assert dict(zip(names, second, strict=True)) == {
        **{"#": "1", "method": "GSF", "backbone": "dinov2_b14", "supervision": "weak", "seeds": "1"},
        **{"PCK @0.05": "30.0", "PCK @0.1": "60.0", "ms / pair": "", "head params (M)": "0.000"},
    }


def test_every_dataset_has_a_name_for_readers():
    assert set(list_datasets()) <= WORDS.keys()


def test_markdown_folds_a_long_table(board):
    short, long = (to_markdown(board(*(result(50.0 + k, label=f"row {k}") for k in range(n)))) for n in (12, 13))
    assert "<details>" not in short and short.count("| row ") == 12
    assert "<details><summary>13 rows</summary>\n\n| # |" in long
    assert long.count("| row ") == 13 and long.rstrip().endswith("|\n\n</details>")
    assert "<details>" in to_markdown(board(result(dataset="synthetic"), study="synthetic")[-1:])


def test_markdown_escapes_text_of_result_files(board):
    label = "a\n</details>\n# big <script> [x](y) `c` \\| *b*"
    text = to_markdown(board(result(label=label, dataset="x\n# y")))
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 |")]
    assert "a \\</details> # big \\<script> \\[x](y) \\`c\\` \\\\\\| \\*b\\*" in row
    assert [line for line in text.splitlines() if line.startswith("#")] == ["### x # y"]


def test_csv_has_every_number_once(board):
    rows = list(csv.DictReader(to_csv(board(result(80.0), papers=read_papers())).splitlines()))
    (whole,) = [row for row in rows if row["measure"] == "PCK @0.1" and not row["group"]]
    assert (whole["measured"], whole["deviation"], whole["published"], whole["place"]) == ("80.0", "", "78.2", "1")
    assert float(whole["difference"]) == pytest.approx(1.8)
    assert {(row["group"], row["level"]) for row in rows} == {
        *(("", ""), ("category", "bus"), ("category", "cat"), ("scale", "easy"), ("scale", "hard"))
    }
    assert len(rows) == 2 * 5


def test_csv_holds_no_formula(board):
    (line, *_) = csv.DictReader(to_csv(board(result(label='=HYPERLINK("x")'))).splitlines())
    assert line["variant"] == """'=HYPERLINK("x")"""


def test_html_is_self_contained_and_escapes_text_of_result_files(board):
    page = to_html(board(result(80.0, label="<script>alert(1)</script></script>")))
    assert "<script>alert" not in page and "\\u003cscript>alert(1)" in page
    assert page.count("</script>") == 2 and "{{" not in page
    assert "http" not in page.replace("http-equiv", "")
