"""Tables of the documentation that `benchmarks/readme_tables.py` writes."""

import sys
from pathlib import Path

from corrzoo.backbones import list_backbones

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import readme_tables  # noqa: E402


def test_the_page_of_backbones_lists_all_of_them():
    page = readme_tables.backbones()  # builds every registered backbone on the meta device
    assert page == (ROOT / "docs" / "backbones.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert table[0] == ["key", "timm name", "patch", "width", "parameters", "licence", "notes"]
    assert [row[0].strip("`") for row in table[2:]] == list_backbones()
    rows = {row[0].strip("`"): row for row in table[2:]}
    assert rows["dinov2_b14"][2:6] == ["14", "768", "86.6 M", "apache-2.0"]
    assert rows["dinov2_l14"][2:5] == ["14", "1024", "304.4 M"]
    assert rows["siglip_b16"][4] == "85.8 M"  # the plain name has 92.9 M
    assert rows["resnet101"][2:5] == ["stride 32", "2048", "42.5 M"]
    assert rows["mae_b16"][5] == "cc-by-nc-4.0"
    assert rows["dinov3_s16"][5] == "dinov3-license"
