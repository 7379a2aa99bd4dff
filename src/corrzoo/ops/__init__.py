"""Dense correlation between two feature grids and what is read from it. Needs torch alone.

`functional` has the public functions, `reference` their equations in plain torch. The fast implementation is a loop
over strips of the correlation (`strips`), each finished by an epilogue in torch (`epilogue`) or Triton (`kernels`).
"""

from corrzoo.ops.functional import Backend, Window, correlation, local_correlation, match, mutual, readout
from corrzoo.ops.reference import Mutual, Readout
from corrzoo.ops.strips import resolve_backend

__all__ = [
    "Backend", "Mutual", "Readout", "Window", "correlation", "local_correlation", "match", "mutual", "readout",
    "resolve_backend",
]  # fmt: skip
