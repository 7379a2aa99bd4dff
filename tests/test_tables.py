import csv

import pytest

from corrzoo.tables import csv_text, markdown, read_csv, write_csv
from corrzoo.types import ZooError


def test_csv_is_read_as_it_was_written(tmp_path):
    rows = [{"a": "1", "b": "x, y"}, {"a": "2", "b": 'a "quoted" word'}]
    (tmp_path / "t.csv").write_text(csv_text(rows), encoding="utf-8-sig")  # spreadsheets begin with a byte order mark
    assert read_csv(tmp_path / "t.csv", ["b"]) == rows
    assert csv_text([], ["a", "b"]) == "a,b\n"
    assert list(csv.reader(csv_text(rows).splitlines()))[1] == ["1", "x, y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file: .*t.csv$"),
        (b"a,c\n1,2\n", "t.csv has no column 'b': expected a CSV file with a header line and the columns a, b$"),
        (b"a,b\n", "t.csv has no rows: expected a CSV file with a header line and the columns a, b$"),
        (b"", "t.csv has no rows"),
        (b"\xff\xfe\x00", "t.csv is not a CSV file: "),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ZooError, match=message):
        read_csv(tmp_path / "t.csv", ["a", "b"])


def test_a_markdown_table_escapes_bars():
    assert markdown(["a", "n"], [["x|y", "1"]], [1]) == "| a | n |\n|---|--:|\n| x\\|y | 1 |"


def test_csv_columns_are_the_keys(tmp_path):
    write_csv(tmp_path / "r.csv", [{"index": 0, "pck": 50.0}, {"index": 1, "pck": 25.0}])
    assert (tmp_path / "r.csv").read_text() == "index,pck\n0,50.0\n1,25.0\n"
    write_csv(tmp_path / "r.csv", [], ("index", "pck"))
    assert (tmp_path / "r.csv").read_text() == "index,pck\n"
