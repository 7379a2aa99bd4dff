"""Compile the kernels for GPUs that are not here, and count what they use: a CSV table on stdout.

The table of all cases is kept as benchmarks/results/correlation_kernels.csv.

`python tests/ops/compiled.py` prints all cases, `--quick` those that the tests assert on. It needs triton, whose wheel
brings ptxas and cuobjdump. It must run without TRITON_INTERPRET.
"""

import csv
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from corrzoo.ops import kernels, launch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ARCHITECTURES = (80, 90, 100)
POINTERS = {
    **dict.fromkeys(("src", "trg"), "features"),
    **dict.fromkeys(("row_at", "col_at"), "i32"),
    **dict.fromkeys(("argmax", "corner"), "i64"),
    **dict.fromkeys(("a", "b", "row_best", "col_best", "temperature", "centre", "out", "rows_in", "moments"), "fp32"),
    **dict.fromkeys(("grad", "dsrc", "dtrg"), "fp32"),
}
GEMMS = [
    ("maxima", {"COLUMNS": True}),
    ("maxima", {"COLUMNS": False}),
    ("expectation", {"KIND": 0, "BEST": True}),
    ("expectation", {"KIND": 1, "BEST": False}),
    ("expectation", {"KIND": 1, "BEST": True}),
    ("expectation", {"KIND": 2, "BEST": False}),
    ("score_gradients", {"KIND": 0, "MOMENTS": True}),
    ("score_gradients", {"KIND": 1, "MOMENTS": True}),
    ("score_gradients", {"KIND": 2, "MOMENTS": True}),
]
PATCHES = [("patch_scores", {"side": 8}), ("patch_gradients", {"side": 8})]
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The machine instruction that multiplies half-precision matrices."""


def compile_case(case: tuple[str, str, dict, int]) -> dict:
    dtype, name, constants, arch = case
    if name.startswith("patch"):
        constants = launch.patch_options(constants["side"])
    else:
        fixed = {"NORMALIZE": True, "PRECISION": "ieee", "UPCAST": False}
        constants = {**constants, **launch.tiles(DTYPES[dtype], arch // 10), **fixed}
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    function = getattr(kernels, name)
    signature, values, aligned = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants or argument in ("src_c", "trg_c"):
            signature[argument], values[argument] = "constexpr", constants.get(argument, 1)
            continue
        kind = POINTERS.get(argument)
        if kind == "features" or (name == "score_gradients" and argument == "out"):
            kind = dtype
        signature[argument] = f"*{kind}" if kind else "fp32" if argument == "extent" else "i32"
        if argument != "extent":
            aligned[(i,)] = [["tt.divisibility", 16]]  # C = 768 and grids of 16², 32², 64²
    source = ASTSource(function, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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
        "case": " ".join(f"{k}={v}" for k, v in case[2].items()),
        "dtype": dtype,
        "arch": arch,
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", report[1])),
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": len(re.findall(rf"\b{TENSOR_CORE[arch]}\b", report[1])),
    }


def main() -> None:
    quick = "--quick" in sys.argv
    gemms = [*(("bf16", *case) for case in GEMMS), *(("fp32", *case) for case in (GEMMS[3::4] if quick else GEMMS))]
    patches = [("fp32", *case) for case in PATCHES]
    cases = [(*case, arch) for case, arch in itertools.product(gemms + patches, ARCHITECTURES)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(compile_case, cases, chunksize=1)
    table = csv.DictWriter(sys.stdout, fieldnames=rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


if __name__ == "__main__":
    main()
