"""What every test may use: where the given data is, and one thread so that two cores serve many tests."""

import ctypes
import fcntl
import gc
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter where there is no GPU. Triton reads this when it is first imported, which
    # other tests' torch.compile does too.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tests leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORRZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def memory_of_the_last_module():
    """Given back before the next begins: gigabytes, held in cycles, and by glibc until it is asked."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="module")
def gigabytes(tmp_path_factory):
    """For tests that hold many: of the processes of a run, one at a time."""
    with (tmp_path_factory.getbasetemp().parent / "gigabytes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with PF-WILLOW and the golden values; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "README.md").is_file():
        pytest.skip("needs the folder ../shared (PF-WILLOW, golden values), which is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path):
    """What the released code of ACTR and LPMFlow answers: see `golden.py`."""
    from golden import Golden

    return Golden(shared / "golden")
