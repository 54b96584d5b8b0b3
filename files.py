"""The terminal and the disk: messages that stop nobody, files whole or not at all, one owner a folder.

A run may be killed, its terminal may go away, a disk may fill up, and two processes may want the same folder.
So a message that cannot be written is dropped. A file is written under a temporary name, flushed to the disk,
and only then renamed. A folder is worked on by the process that holds its lock. Before it saves, that process
looks whether the folder is still the one that it locked.

This file needs no torch, whose import takes seconds: a command hears Ctrl-C from its first lines on.
"""

import atexit
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Callable, Iterator, TextIO

SECONDS_BETWEEN_LINES = 2


# ---- the terminal ------------------------------------------------------------------------------------------

def write_line(stream: TextIO, text: str) -> None:
    """Print to a stream, or drop the text: a reader that is gone or a full disk is no reason to stop."""
    if stream is None:    # the process was started without it
        return
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)    # a terminal may know ASCII alone
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError, RuntimeError):
        # OSError: the reader is gone, or the disk is full. ValueError: the stream is closed. RuntimeError: a
        # signal came in the middle of a write, and its handler wrote too
        pass


def drop_unwritten(stream: TextIO | None) -> None:
    """Write what is left in a stream's buffer or, where that fails, send it nowhere.

    Python tries to write the rest when it ends. Where it cannot, it complains and exits with code 120.
    """
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):    # a stream without a file of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@atexit.register
def drop_all_unwritten() -> None:
    for stream in (sys.stdout, sys.stderr):
        drop_unwritten(stream)


def tell(text: str) -> None:
    """Print a result, to standard output."""
    write_line(sys.stdout, text)


def say(text: str) -> None:
    """Print what is going on, to standard error."""
    write_line(sys.stderr, text)


def complain(error: Exception | str) -> None:
    """Print an error, as one line for every line of its text."""
    say("error: " + "\n  ".join(" ".join(line.split()) for line in str(error).splitlines()))


def duration(seconds: float) -> str:
    """Seconds as a person says them: "40 s", "12 min", "30 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} hours"


def counted(number: int, thing: str) -> str:
    """A number of things: "1 question", "2 questions", "1,000 questions"."""
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {thing}s"


class Progress:
    """Says every few seconds how far a piece of work is and, where its size is known, what time is left."""

    def __init__(self, total: float | None = None):
        self.total = total
        self.started = self.shown = time.monotonic()

    def tick(self, done: float, text: str, seconds: float | None = None) -> None:
        """Say `text` and the time left, if the last line is long enough ago.

        Args: done, how much of `total`; seconds, the time spent on it, by default since this object was made.
        """
        now = time.monotonic()
        if now - self.shown < SECONDS_BETWEEN_LINES:
            return
        self.shown = now
        if self.total and done:
            if seconds is None:
                seconds = now - self.started
            text += f", about {duration(seconds / done * max(0, self.total - done))} left"
        say(text)


def stop_from_the_first_line() -> None:
    """Make Ctrl-C end this process with one line, while a command has begun nothing but its imports."""
    def stop(number, frame):
        say("stopped")
        os._exit(128 + number)    # an exception could be caught by whatever is being imported

    signal.signal(signal.SIGINT, stop)


# ---- files -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open, as "wb" or "w" (UTF-8), a temporary file that becomes `path` when the block ends well.

    If the block raises, `path` keeps what it held and the temporary file is removed. OSError, which names
    `path`, where it cannot be written. (model.write_pt does the same for tensors.)
    """
    path, temporary = Path(path), None
    encoding = None
    if "b" not in mode:
        encoding = "utf-8"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o644)     # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written: {error.strerror}. What was saved before is "
                          "kept.") from error
        raise


def write_json(path: Path, values: list[dict], indent: int | None = None) -> None:
    """Write JSON values, each beginning on a line of its own."""
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(value, indent=indent) + "\n" for value in values)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark. ValueError where it is no regular file:
    reading a pipe might never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    return path.read_text(encoding="utf-8-sig")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number from 1 on.

    Only a line feed ends a line: JSON allows U+2028 and its like inside a string, where splitlines would cut.
    """
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


# ---- folders -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def owned(folder: Path) -> Iterator[Callable[[], None]]:
    """Own a folder while the block runs. The folder is made if need be, and cleared of what a killed owner
    left half written.

    Yields a function for the owner to call before it writes. That function raises ValueError if the folder
    has been deleted or replaced meanwhile, for it may then hold another's work.
    Raises: ValueError where another process owns the folder, OSError where the folder cannot be written.
    """
    # imported late, because that takes as long as importing all else in this file
    from filelock import FileLock, Timeout

    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is already working in {folder}. Wait for it, or pass a different "
                         "--runs DIR.") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}. Pass a different --runs DIR.") from None

    def check_still_owned() -> None:
        # our lock file stays open, so a new lock file cannot have been given the same inode
        if not lock.exists() or not os.path.samestat(os.stat(lock), locked):
            raise ValueError(f"{folder} was deleted or replaced while this run was working in it, so this "
                             "run stops. Start it again, or pass a different --runs DIR.")

    with held:
        locked = os.stat(lock)
        for leftover in folder.glob("*/.*.????????"):    # of mkstemp, as above and in model.write_pt
            leftover.unlink()
        for leftover in folder.glob(".copy-*"):          # of runs.copy_identical_no_fs
            shutil.rmtree(leftover)
        yield check_still_owned


def delete_folders(folders: list[Path]) -> None:
    """Delete those folders that are there. ValueError, with nothing deleted, where a link leads elsewhere."""
    for folder in folders:
        for path in (folder, folder.parent):
            if path.is_symlink():
                raise ValueError(f"{path} is a link, and --fresh follows no links. Delete it yourself.")
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
