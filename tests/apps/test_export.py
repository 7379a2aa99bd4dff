"""`corrzoo export`: the exported program and the ONNX model equal the model, for every head."""

import subprocess
import sys

import onnxruntime
import pytest
import torch

import corrzoo
from corrzoo.__main__ import main
from corrzoo.apps.export import MatchPoints, export, to_onnx
from small import CASES, build

SIDE = 96


def example(points):
    generator = torch.Generator().manual_seed(points)
    src, trg = (torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator) for _ in range(2))
    return src, trg, torch.rand(1, points, 2, generator=generator) * SIDE


@pytest.fixture(scope="module", params=CASES)
def exported(request):
    """Every head on a tiny backbone, and its exported program."""
    model = build(request.param).eval()
    return model, export(model, (SIDE, SIDE))


def test_the_program_equals_the_model_for_any_number_of_points(exported):
    model, program = exported
    assert not any("corrzoo" in str(node.target) for node in program.graph.nodes)  # it runs without corrzoo
    for points in (1, 5):
        inputs = example(points)
        with torch.no_grad():
            expected = MatchPoints(model)(*inputs)
        torch.testing.assert_close(program.module()(*inputs), expected, atol=1e-3, rtol=1e-5)


def test_onnx_equals_the_model_for_any_number_of_points(exported):
    model, program = exported
    session = onnxruntime.InferenceSession(to_onnx(program), providers=["CPUExecutionProvider"])
    # TransforMatcher's released position embedding is the rounding error of sines of many full turns.
    tolerance = 0.05 if type(model).__name__ == "TransforMatcher" else 2e-3
    for points in (1, 5):
        inputs = example(points)
        with torch.no_grad():
            expected = MatchPoints(model)(*inputs)
        named = {name: value.numpy() for name, value in zip(("src", "trg", "points"), inputs, strict=True)}
        (found,) = session.run(None, named)
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=tolerance, rtol=0)


def test_the_command_writes_a_file_that_torch_alone_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = build("Baseline").eval()
    model.image_size = SIDE
    corrzoo.save(model, "saved")
    main(["export", "--ckpt=saved", "--out=made/m.pt2"])
    assert "Baseline on timm/test_vit.r160_in1k, network image 96: made/m.pt2" in capsys.readouterr().out
    code = (
        "import sys, torch; sys.modules['corrzoo'] = None\n"  # importing it fails
        "inputs = torch.load('inputs.pt')\n"
        "torch.save(torch.export.load('made/m.pt2').module()(*inputs), 'found.pt')"
    )
    inputs = example(3)
    torch.save(inputs, "inputs.pt")
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load("found.pt"), MatchPoints(model)(*inputs), atol=1e-3, rtol=1e-5)


def test_errors_are_one_line(monkeypatch):
    with pytest.raises(SystemExit, match=r"error: --out m.pt: expected a name that ends in .pt2 or .onnx"):
        main(["export", "--out=m.pt"])
    with pytest.raises(SystemExit, match="error: ACTR needs trained weights"):
        main(["export", "--out=m.pt2", "--head=ACTR"])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(corrzoo.ZooError, match=r'pip install "corrzoo\[onnx\]"'):
        to_onnx(None)
