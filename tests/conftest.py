"""Fixtures for all tests, and one thread per process, so that tests run in parallel on two cores."""

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
    """Keep tests out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORRZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def memory_of_the_last_module():
    """Free memory after a test: reference cycles, and memory that glibc keeps."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="module")
def gigabytes(tmp_path_factory):
    """Let one test at a time, over all test processes, use gigabytes of memory."""
    with (tmp_path_factory.getbasetemp().parent / "gigabytes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder beside the repository with PF-WILLOW and golden values. Tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "README.md").is_file():
        pytest.skip("needs the folder ../shared (PF-WILLOW, golden values), which is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path):
    """Golden values of the released code of ACTR and LPMFlow, see `golden.py`."""
    from golden import Golden

    return Golden(shared / "golden")
