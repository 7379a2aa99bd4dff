"""Compile the kernels for GPUs that are not here, and count what they use: a CSV table on stdout.

`python tests/ops/compiled.py` prints all cases, kept as benchmarks/results/correlation_kernels.csv; `--quick` prints
those of the tests. It needs triton, whose wheel brings ptxas and cuobjdump, and runs without TRITON_INTERPRET.
"""

import csv
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from corrzoo.ops import kernels
from corrzoo.ops.epilogue import Rows

ARCHITECTURES = (80, 90, 100)
GRIDS = {"16²": 16, "32²": 32, "37²": 37, "64²": 64, "128²": 128, "160²": 160}
"""37² is padded; 160² takes several tiles a row."""
POINTERS = {
    **dict.fromkeys(("src", "trg", "x"), "features"),
    **dict.fromkeys(("a", "b", "block", "xy", "lse", "dxy", "moments", "grad", "scale", "temperature"), "fp32"),
    "argmax": "i64",
}


def cases(quick: bool) -> list[tuple[str, dict, str, str, int]]:
    """(kernel, its constants, dtype of features and score gradients, grid, architecture)."""
    found = []
    for kind, (grid, side) in itertools.product(("none", "argmax", "crop"), GRIDS.items()):
        if quick and (grid, kind) not in {(g, "argmax") for g in GRIDS} | {("64²", k) for k in ("none", "crop")}:
            continue
        rows = Rows(kind, (side, side), *[None] * 8)
        found.append(("positions", kernels.tile(rows, kernels.ONCE), "fp32", f"{kind} {grid}"))
        for dtype in ("bf16",) if quick else ("bf16", "fp32"):
            found.append(("product_gradients", kernels.tile(rows) | {"MOMENTS": True}, dtype, f"{kind} {grid}"))
    for name, dtype in itertools.product(("norms", "remove_along"), ("bf16", "fp32")):
        found.append((name, kernels.FEATURES, dtype, "any grid"))
    return [(*case, arch) for case, arch in itertools.product(found, ARCHITECTURES)]


def compile_case(case: tuple[str, dict, str, str, int]) -> dict[str, object]:
    name, constants, dtype, grid, arch = case
    function, constants = getattr(kernels, name), dict(constants)
    options = {"num_warps": constants.pop("num_warps")}
    signature, values, aligned = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants or argument.endswith("_c"):
            signature[argument], values[argument] = "constexpr", constants.get(argument, 1)
            continue
        kind = POINTERS.get(argument)
        if kind == "features" or argument == "out":
            kind = dtype
        signature[argument] = f"*{kind}" if kind else "fp32" if argument == "extent" else "i32"
        # As the launcher finds them: addresses, sizes and strides are multiples of 16, but for a grid of 37².
        odd = ("extent", "first_item", "first_point", "rows", *(("M", "N", "stride") if "37²" in grid else ()))
        if argument not in odd:
            aligned[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(function, signature, values, aligned), target=GPUTarget("cuda", arch, 32), options=options
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = [
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        ]
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report[0]).groups())
    return {
        "kernel": name,
        "case": grid,
        "constants": " ".join(f"{k}={v}" for k, v in case[1].items()),
        "dtype": dtype,
        "arch": arch,
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", report[1])),
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", report[1], re.MULTILINE)),
        "wide_loads": len(re.findall(r"\bLDG\.E\S*\.128\b", report[1])),
    }


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(compile_case, cases("--quick" in sys.argv), chunksize=1)
    table = csv.DictWriter(sys.stdout, fieldnames=rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


if __name__ == "__main__":
    main()
