"""What every test shares: the repository root on the import path, one thread, and the optional real files.

Two OpenMP threads on a loaded machine can be ten times slower than one, so tests pin one. The folder
../shared (real records and small real checkpoints) is not part of the product: tests that use it skip where
it is absent.
"""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real records and checkpoints, beside the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "weights").is_dir():
        pytest.skip("needs the folder ../shared (real records and checkpoints)")
    return folder


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 error against a reference, in fp64; NaN where the value holds one, so use
    `not (err <= tol)`."""
    reference = reference.double()
    scale = reference.norm().clamp_min(1e-30)
    return ((value.double() - reference).norm() / scale).item()
