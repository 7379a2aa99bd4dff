"""Dense correlation between two feature grids and what is read from it. Needs torch alone.

`reference` has the equations in plain torch, `functional` the functions that never hold a whole correlation volume.
These loop over strips of it (`strips`), each finished by an epilogue in torch (`epilogue`) or Triton (`kernels`).
`convolution` convolves whole volumes.
"""

from corrzoo.ops.convolution import conv4d
from corrzoo.ops.functional import Backend, local_correlation, match, mutual
from corrzoo.ops.reference import Mutual, Readout, Window, correlation, readout
from corrzoo.ops.strips import resolve_backend

__all__ = [
    "Backend", "Mutual", "Readout", "Window", "conv4d", "correlation", "local_correlation", "match", "mutual",
    "readout", "resolve_backend",
]  # fmt: skip
