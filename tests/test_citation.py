"""CITATION.cff agrees with the texts of the papers and cites every head."""

import re
from pathlib import Path

import yaml

import corrzoo

CITATION = Path(__file__).resolve().parents[1] / "CITATION.cff"


def words(text):
    return re.sub(r"[^a-z]+", " ", text.lower())


def test_titles_and_authors_are_in_the_papers(shared):
    said = words("".join(path.read_text() for path in (shared / "papers").glob("*.txt")))
    for reference in yaml.safe_load(CITATION.read_text())["references"]:
        assert words(reference["title"]) in said
        for author in reference["authors"]:
            assert words(author.get("name") or f"{author['given-names']} {author['family-names']}") in said


def test_every_head_is_cited():
    content = yaml.safe_load(CITATION.read_text())
    assert content["version"] == corrzoo.__version__ and content["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= content.keys()
    assert len(content["references"]) == 9
    assert all(reference.keys() >= {"type", "title", "authors"} for reference in content["references"])
    notes = " ".join(reference["notes"] for reference in content["references"])
    assert all(head in notes for head in corrzoo.list_heads())
