"""What every test may use: where the given data is, and one thread so that two cores serve many tests."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter where there is no GPU. Triton reads this when it is first imported, which
    # other tests' torch.compile does too.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tests leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORRZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
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
