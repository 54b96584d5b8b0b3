"""Files: the one way in which this project puts one under its final name, and tensors in and out.

A run may be killed, a disk may fill up, two processes may race. So every file is written under a temporary
name in the same folder, flushed to the disk, and only then renamed, which the file system does in one step: a
reader sees the whole old file or the whole new one, never a part.

torch is imported where it is used: a report on records needs none of it.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import IO, Iterator

try:
    import fcntl
except ImportError:
    fcntl = None    # Windows


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file that becomes `path` when the block ends well.

    Args: path, whose folder is made if need be; mode, "wb" or "w" (UTF-8).
    If the block raises, or the disk is full, `path` keeps what it held and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)     # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, made if need be, and clear away what killed ones left half
    written. Raises ValueError where another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):    # some network disks have no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another process is at work here; let it finish, or use "
                                 "--runs DIR") from None
        for leftover in folder.glob(".*.????????"):
            leftover.unlink()
        yield
    finally:
        os.close(handle)


def save_tensors(value, path: str | Path) -> None:
    """torch.save, whole or not at all.
    Raises OSError, also for a full disk, which torch calls a RuntimeError.
    """
    import torch
    try:
        with atomic_write(path) as file:
            torch.save(value, file)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written, is the disk full? "
                      f"({str(error).splitlines()[0][:120]})") from error


def load_weights(path: str | Path) -> dict:
    """A file's state dict of dense float tensors, on the CPU. Nothing in the file is executed.

    Raises FileNotFoundError, or ValueError that names file and fault.
    """
    import torch
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of an official RWKV-7 .pth")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:    # torch raises half a dozen types here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint, is it whole? ({reason[:160]})") from error

    def is_plain(name, value) -> bool:
        is_tensor = isinstance(name, str) and isinstance(value, torch.Tensor)
        return (is_tensor and value.is_floating_point() and value.layout == torch.strided
                and not value.is_meta)

    if not isinstance(weights, dict) or not all(is_plain(*item) for item in weights.items()):
        raise ValueError(f"{path}: not a state dict of dense float tensors, so not an RWKV-7 checkpoint")
    return weights
