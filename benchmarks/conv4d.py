"""Time of `corrzoo.ops.conv4d` as a multiple of the plain sum of 3-D convolutions, for NCNet's layers.

python benchmarks/conv4d.py [--device cuda] writes conv4d_<device>.csv: forward, and forward with backward (step), of
each layer of a network of kernels of 5 and 16 channels. Ratios are medians of rounds, in each of which both run.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from corrzoo.ops.convolution import conv4d, conv4d_reference
from corrzoo.tables import write_csv
from measuring import RESULTS, device_name, timed

LAYERS = ((1, 16), (16, 16), (16, 1))


def measure(channels: int, outputs: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the reference's milliseconds, and our time as a multiple of them."""
    torch.manual_seed(0)
    volume = torch.randn(1, channels, *[args.grid] * 4, device=args.device, requires_grad=True)
    weight = (torch.randn(outputs, channels, 5, 5, 5, 5, device=args.device) / 100).requires_grad_()
    bias = torch.randn(outputs, device=args.device, requires_grad=True)
    row: dict[str, Any] = {"channels": f"{channels} -> {outputs}", "grid": f"{args.grid}^4"}
    for name in ("forward", "step"):

        def run(function: Callable[..., torch.Tensor], backward: bool = name == "step") -> None:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16), torch.set_grad_enabled(backward):
                out = function(volume, weight, bias)
            if backward:
                out.float().square().mean().backward()

        for function in (conv4d_reference, conv4d):
            run(function)  # kernels are chosen
        rounds = [
            [timed(run, f, device=args.device)[0] for f in (conv4d_reference, conv4d)] for _ in range(args.rounds)
        ]
        row[f"{name}_reference_ms"] = round(1000 * statistics.median(plain for plain, _ in rounds), 1)
        row[f"{name}_ratio"] = round(statistics.median(ours / plain for plain, ours in rounds), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=16, help="cells per side of either image")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(*layer, args) | {"bf16": args.bf16, "torch": torch.__version__} for layer in LAYERS]
    write_csv(args.out / f"conv4d_{device_name(args.device)}.csv", rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
