"""Dense correlation: scores between two feature grids and what is read out of them. Needs torch alone.

`functional` holds the public functions, `reference` the equations in plain torch. `library` makes torch operators of
the two fast implementations: `streaming` (any device) and `launch` with its `kernels` (Triton, imported when used).
`convolution` convolves whole volumes.
"""

from corrzoo.ops.convolution import conv4d
from corrzoo.ops.functional import (
    Backend,
    Window,
    correlation,
    local_correlation,
    match,
    mutual,
    readout,
    resolve_backend,
)
from corrzoo.ops.reference import Matches, Mutual

__all__ = [
    "Backend", "Matches", "Mutual", "Window", "conv4d", "correlation", "local_correlation", "match", "mutual",
    "readout", "resolve_backend",
]  # fmt: skip
