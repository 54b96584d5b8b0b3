"""Nothing half written: the one way in which this project puts a file under its final name.

A run may be killed, a disk may fill up, two processes may race. So every file is written under a temporary
name in the same folder, flushed to the disk, and only then renamed, which the file system does in one step: a
reader sees the whole old file or the whole new one, never a part.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import IO, Iterator

import torch


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


def save_tensors(value, path: str | Path) -> None:
    """torch.save, whole or not at all.
    Raises OSError, also for a full disk, which torch calls a RuntimeError.
    """
    try:
        with atomic_write(path) as file:
            torch.save(value, file)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written, is the disk full? "
                      f"({str(error).splitlines()[0][:120]})") from error
