"""`corrzoo export`: a trained model as one file that runs without corrzoo."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from corrzoo.apps import add_model, matcher_of
from corrzoo.errors import Parser, ZooError
from corrzoo.files import whole_file
from corrzoo.matcher import Matcher

ABOUT = """Export a model as one file that runs without corrzoo.

The exported program maps two images and n points of the first, (src, trg, points), to their matches in the second:
uint8 images (1, 3, H, W) at the size of the network image, and float32 points (1, n, 2) in its pixels, (x, y) with
(0, 0) at the top-left corner of the top-left pixel. n may differ from call to call; H and W may not.

  .pt2   torch.export.load("m.pt2").module()(src, trg, points)
  .onnx  onnxruntime.InferenceSession("m.onnx").run(None, {"src": src, "trg": trg, "points": points})
"""


class MatchPoints(nn.Module):
    """What is exported: images (1, 3, H, W) uint8 and points (1, n, 2) -> matches (1, n, 2), in network pixels."""

    def __init__(self, matcher: Matcher) -> None:
        super().__init__()
        self.matcher = matcher

    def forward(self, src: Tensor, trg: Tensor, points: Tensor) -> Tensor:
        return self.matcher.match_points(*self.matcher.features_of(src, trg), points)


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="corrzoo export", description=ABOUT)
    parser.add_argument("--out", type=Path, required=True, help="the file, which ends in .pt2 or .onnx")
    add_model(parser)
    options = parser.parse_args(args)
    if options.out.suffix not in (".pt2", ".onnx"):
        raise ZooError(f"--out {options.out}: expected a name that ends in .pt2 or .onnx")
    matcher = matcher_of(options)
    size = matcher.image_size
    program = export(matcher, (size, size) if isinstance(size, int) else size)
    with whole_file(options.out) as partial:
        if options.out.suffix == ".pt2":
            with partial.open("wb") as file:
                torch.export.save(program, file)
        else:
            partial.write_bytes(to_onnx(program))
    print(f"{matcher.title}, network image {size}: {options.out}")


def export(matcher: Matcher, size: tuple[int, int]) -> ExportedProgram:
    """Trace `MatchPoints` on the CPU for network images of `size` (H, W) and any number of points.

    The matcher is moved to the CPU, in evaluation mode and without gradients: a program runs where it was traced.
    """
    matcher.cpu().eval().load_weights().requires_grad_(False)
    # Two tensors: the tracer would take one tensor, given twice, for one input.
    src, trg = (torch.zeros(1, 3, *size, dtype=torch.uint8) for _ in range(2))
    points = torch.full((1, 2, 2), 1.0)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # notes of the tracer to itself
        return torch.export.export(
            MatchPoints(matcher),
            (src, trg, points),
            dynamic_shapes=(None, None, {1: Dim("n", min=1)}),
            strict=False,
        )


def to_onnx(program: ExportedProgram) -> bytes:
    """The program as an ONNX model.

    Raises:
        ZooError: if the extra `onnx` is not installed.
    """
    try:
        import onnxscript  # noqa: F401 - what torch.onnx needs
    except ModuleNotFoundError as error:
        raise ZooError('exporting to ONNX needs: pip install "corrzoo[onnx]"') from error
    with warnings.catch_warnings(action="ignore"):
        inputs, outputs = ["src", "trg", "points"], ["matches"]
        model = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert model is not None
    return model.model_proto.SerializeToString()
