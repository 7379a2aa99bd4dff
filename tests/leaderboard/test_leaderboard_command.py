"""The command `corrzoo leaderboard`: the files it writes, and its messages."""

import json
from pathlib import Path

import pytest
from made_up import result

from corrzoo.errors import ZooError
from corrzoo.leaderboard import TABLES, main
from corrzoo.leaderboard.papers import PAPERS, read_papers


def leaves(args):
    """The exit code of a command that writes no message."""
    with pytest.raises(SystemExit) as leaving:
        main(args)
    return leaving.value.code


NO_MARKERS = rf"{TABLES} has no lines <!-- leaderboard -->"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder like the repository's, with one result and a page that has the markers."""
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "benchmarks" / "results" / "study"
    study.mkdir(parents=True)
    (study / "one.json").write_text(json.dumps(result(80.0)))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "leaderboard.md").write_text(
        "before\n<!-- leaderboard -->\nold\n<!-- /leaderboard -->\nafter\n"
    )
    return tmp_path


def test_files_are_written_and_checked(project, capsys):
    main([])
    page = (project / "docs" / "leaderboard.md").read_text()
    assert page.startswith("before\n<!-- leaderboard -->\n### SPair-71k\n") and "\nold\n" not in page
    assert page.endswith("<!-- /leaderboard -->\nafter\n") and "| 78.2 |" in page and "| +1.8 |" in page
    assert {path.suffix for path in (project / "docs").glob("leaderboard.*")} == {".html", ".csv", ".md"}
    assert leaves(["--check"]) == 0
    (project / "benchmarks" / "results" / "study" / "one.json").write_text(json.dumps(result(79.0)))
    with pytest.raises(ZooError, match=r"docs/leaderboard\.html, .*docs/leaderboard\.md: out of date"):
        main(["--check"])
    main([])
    assert leaves(["--check"]) == 0
    (project / "docs" / "leaderboard.csv").write_text("touched\n")
    with pytest.raises(ZooError, match=r"^docs/leaderboard\.csv: out of date"):
        main(["--check"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object, got a list"),
        ("{}", "no text field 'head'"),
        ("[" * 100_000, "recursion"),
        (json.dumps(result() | {"pck": {"pck@0.05": 1.0}}), "no field with the scores pck@0.05, pck@0.1"),
        (json.dumps(result() | {"pck": {"pck@0.05": "", "pck@0.1": 1.0}}), "score '' is not a percentage"),
        *(
            (
                json.dumps(result() | {"pck": {"pck@0.05": 1.0, "pck@0.1": value}}),
                f"score {value!r} is not a percentage",
            )
            for value in (250, -5e9, True)
        ),
        (json.dumps(result() | {"breakdown": {"category": {"bus": {"pairs": 5}}}}), "pck@0.05/image"),
        (json.dumps(result() | {"breakdown": {"scale": {"9": {}}}}), "out of range"),
        (json.dumps(result() | {"pck": {"pck@0.05": float("nan"), "pck@0.1": 1.0}}), "NaN is not a finite number"),
        (json.dumps(result() | {"ms_per_pair": 77.5}).replace("77.5", "1e999"), "1e999 is not a finite number"),
        (json.dumps(result() | {"alphas": []}), "no field with the scores"),
        (json.dumps(result() | {"seed": "0"}), "seed '0' is not an integer"),
        (json.dumps(result() | {"label": "\ud800x"}), "surrogates not allowed"),
        (json.dumps(result() | {"supervision": "some"}), "not in tuple"),
        *((json.dumps(result() | {key: "word"}), "") for key in ("versions", "options", "trained", "params_head")),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_corrupt_file_is_skipped_with_a_warning(project, capsys, content, why):
    bad = project / "benchmarks" / "results" / "study" / "bad.json"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    main([])
    message = capsys.readouterr().err.strip()
    assert (
        message.startswith("warning: benchmarks/results/study/bad.json skipped: not a result file (") and why in message
    )
    assert len(message.splitlines()) == 1
    assert leaves(["--check"]) == 1  # though every file is what it would be


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: (p / "benchmarks/results/study/one.json").unlink(), "no result files under benchmarks/results:"),
        (
            lambda p: (p / "benchmarks/results/study/one.json").write_text("{}"),
            "no result files under benchmarks/results:",
        ),
        (
            lambda p: (p / TABLES).write_text("no markers"),
            NO_MARKERS,
        ),
        (
            lambda p: (p / TABLES).write_text("<!-- /leaderboard -->\n<!-- leaderboard -->\n"),
            NO_MARKERS,
        ),
        (lambda p: (p / TABLES).unlink(), NO_MARKERS),
    ],
)
def test_bad_input_gives_a_one_line_error(project, break_it, message):
    break_it(project)
    with pytest.raises(ZooError, match=message) as error:
        main([])
    assert "\n" not in str(error.value) and not (project / "docs" / "leaderboard.html").exists()


def test_papers_csv_may_come_from_a_spreadsheet(tmp_path):
    """Excel writes a byte order mark before the first title."""
    (tmp_path / "my.csv").write_text(PAPERS.read_text(), encoding="utf-8-sig")
    assert read_papers(tmp_path / "my.csv") == read_papers()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file: my\.csv"),
        ("paper,table\na,b\n", "my.csv has no column 'label'"),
        (PAPERS.read_text().replace("35.6,%", "many,%"), "the value 'many' of actr_poster, comparison is not a number"),
    ],
)
def test_bad_papers_csv_gives_a_one_line_error(project, content, message):
    if content is not None:
        (project / "my.csv").write_text(content)
    with pytest.raises(ZooError, match=message) as error:
        main(["--papers", "my.csv"])
    assert "\n" not in str(error.value) and not (project / "docs" / "leaderboard.html").exists()


def test_incomplete_file_is_not_read(project, capsys):
    (project / "benchmarks" / "results" / "study" / ".two.json.x1.json").write_text("{")
    main([])
    assert capsys.readouterr().err == ""


def test_error_names_a_missing_path(project):
    with pytest.raises(ZooError, match=r"^no such file or folder: nothere$"):
        main(["nothere"])


def test_outside_a_checkout_runs_are_read_and_no_tables_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZooError, match=r"^no such file or folder: runs$"):
        main([])
    results = tmp_path / "runs" / "Baseline" / "version_0" / "results"
    results.mkdir(parents=True)
    (results / "spair71k.json").write_text(json.dumps(result(80.0)))
    main([])
    assert not (tmp_path / "docs" / "leaderboard.md").exists()
    assert "ViTSC, Table 1" in (tmp_path / "docs" / "leaderboard.csv").read_text()  # corrzoo's own papers.csv


def test_results_given_by_path_do_not_change_the_tables(project):
    page = project / "docs" / "leaderboard.md"
    before = page.read_text()
    main(["benchmarks/results", "--papers", "", "--out", "board"])
    assert page.read_text() == before and (project / "board" / "leaderboard.html").is_file()
    main(["benchmarks/results/study/one.json", "--readme", "docs/leaderboard.md", "--out", "board"])
    assert "### SPair-71k" in page.read_text()


def test_either_all_files_are_written_or_none(project, monkeypatch):
    main([])
    files = [*(project / "docs").iterdir()]
    before = [path.read_bytes() for path in files]
    (project / "benchmarks" / "results" / "study" / "one.json").write_text(json.dumps(result(79.0)))
    write, written = Path.write_bytes, []

    def full_disk(path, content):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        main([])
    assert [path.read_bytes() for path in files] == before and len(written) == 2
    assert set((project / "docs").iterdir()) == set(files)
