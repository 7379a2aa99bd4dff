"""The table of costs that `benchmarks/step.py` writes."""

import csv
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import step  # noqa: E402
from corrzoo.heads import HEADS  # noqa: E402
from measuring import gflops  # noqa: E402

ROWS = {row["head"]: row for row in csv.DictReader((ROOT / "benchmarks/results/step_cpu.csv").open())}


def test_new_counts_keep_the_times_of_other_rows_and_their_own(tmp_path):
    path, key = tmp_path / "step.csv", dict(zip(step.KEY[1:], ("a", 256, 1, "fp32", False), strict=True))
    step.write(path, [{"head": "A", **key, "gflops": 1.0, "forward_ms": 7.0}, {"head": "B", **key, "gflops": 2.0}])
    step.write(path, [{"head": "A", **key, "gflops": 3.0}, {"head": "A", **key, "size": 512, "gflops": 4.0}])
    found = [(row["head"], row["size"], row["gflops"], row["forward_ms"]) for row in csv.DictReader(path.open())]
    assert found == [("A", "256", "3.0", "7.0"), ("B", "256", "2.0", ""), ("A", "512", "4.0", "")]


def test_products_in_half_precision_are_counted():
    with FakeTensorMode():  # no GPU is needed
        x = torch.empty(2, 5, 6, device="cuda", dtype=torch.bfloat16)
        assert gflops(lambda: torch.bmm(x, x.mT, out_dtype=torch.float32)) == 2 * (2 * 5 * 5 * 6) / 1e9


def test_a_head_that_fails_does_not_end_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    options = ["--backbones", "timm/test_vit.r160_in1k", "--size", "64", "--rounds", "0", "--out", str(tmp_path)]
    options += ["--heads", "Baseline", "GSF", "--options", '{"levels": null, "grid": 8}']  # the Baseline has no grid
    monkeypatch.setattr(sys, "argv", ["step.py", *options])
    with pytest.raises(SystemExit, match="not measured: Baseline"):
        step.main()
    assert "'grid'" in capsys.readouterr().err
    assert [row["head"] for row in csv.DictReader((tmp_path / "step_cpu.csv").open())] == ["GSF"]


@pytest.mark.parametrize(
    ("head", "gflops"),
    [
        ("NCNet", 47.2 + 0.1),  # two passes of 180,000 multiplications for each of 256**2 scores, and the scores
        ("GeoAware", 0.6 + 0.1),  # 0.63 M multiplications a cell; 256**2 scores of 768 channels
        ("TransforMatcher", 2.6 + 0.9),  # 15**4 matches; their scores in 12 levels
        ("CATs", 33.4 * 12 / 8),  # 12 levels instead of ResNet-101's 8
    ],
)
def test_counts_are_those_of_the_released_code(head, gflops):
    assert float(ROWS[head]["gflops"]) - float(ROWS[head]["gflops_backbone"]) == pytest.approx(
        gflops, rel=0.02, abs=0.06
    )


@pytest.mark.parametrize("head", HEADS.names())
def test_the_table_has_the_parameters_of_the_heads(head):
    with torch.device("meta"):  # without memory
        model = HEADS[head](backbone="ibot_b16", **step.options_of(head, "ibot_b16"))
    head_parameters = sum(p.numel() for p in model.parameters()) - model.backbone.num_params
    assert float(ROWS[head]["params_head_m"]) == round(head_parameters / 1e6, 3)
