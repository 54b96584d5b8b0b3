"""What every test shares: the repository root on the import path, one thread, and the optional real files.

Two OpenMP threads on a loaded machine can be ten times slower than one, so tests pin one. The folder
../shared (real records and small real checkpoints) is not part of the product: tests that use it skip where
it is absent.
"""

import os
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


@pytest.fixture(autouse=True)
def environment():
    """A command run in this process sets variables that are not for the next test's processes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 error against a reference, in fp64; NaN where the value holds one, so use
    `not (err <= tol)`."""
    reference = reference.double()
    scale = reference.norm().clamp_min(1e-30)
    return ((value.double() - reference).norm() / scale).item()


def refusal(capsys, main, argv) -> str:
    """The error that a command ends with, after the notes and progress of what went well before: exit code 2,
    one error, no traceback."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1, err
    return err[err.index("error: "):].rstrip("\n")
