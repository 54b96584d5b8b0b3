"""Files from the network with the standard library: whole or not at all, resumed, retried."""

import contextlib
import http.client
import io
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, Sequence

try:
    import fcntl                # locks a download against a second process
except ImportError:
    fcntl = None                # Windows, which cannot rename an open file either: fetch files by hand there

CHUNK = 1 << 18                 # bytes read at once
LARGEST_MEMBER = 1 << 26        # bytes of one member of an archive: it is read into memory


class Failure(Exception):
    """The source did not give the file; `again` where a second attempt may do better."""

    def __init__(self, reason: str, again: bool):
        super().__init__(reason)
        self.again = again


@contextlib.contextmanager
def answer_to(url: str, headers: dict[str, str], reached: bool) -> Iterator[http.client.HTTPResponse]:
    """The server's answer to a GET. Whatever goes wrong on the way, while it is being read too, is a Failure.

    A server that was never reached (`reached`: by an earlier request) is not tried again, so that a machine
    without a network does not wait.
    """
    headers = headers | {"User-Agent": "future-seed", "Accept-Encoding": "identity"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            reached = True
            yield answer
    except urllib.error.HTTPError as error:
        again = error.code >= 500 or error.code in (408, 416, 429)
        raise Failure(f"the server answered {error.code} {error.reason}", again) from error
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError,
            TimeoutError) as error:
        raise Failure(f"no connection: {getattr(error, 'reason', None) or error!r}", reached) from error


def with_retries(work: Callable, name: str, attempts: int, pause: float):
    """work(), tried up to `attempts` times with pauses (seconds) that double; raises its last Failure."""
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except Failure as failure:
            if not failure.again or attempt == attempts:
                raise
            print(f"note: {name}: {failure}; trying again", file=sys.stderr, flush=True)
            time.sleep(pause * 2 ** (attempt - 1))


# ---- a whole file ------------------------------------------------------------------------------------------

def download(url: str, path: str | Path, check: Callable[[Path], object] | None = None, offline: bool = False,
             attempts: int = 4, pause: float = 1.0) -> None:
    """Fetch url to path, unless path is there.

    The bytes go to path + ".part"; a broken transfer goes on from there, in this call or a later one, as long
    as the server has the same file (its ETag, kept in path + ".part.tag"). Only a whole file is named `path`.
    Args: check, called with the .part file, raises ValueError to refuse it; the rest as in with_retries.
    Raises FileNotFoundError where the source does not give the file, always when `offline`, and OSError where
    the file cannot be stored.
    """
    path = Path(path)
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    by_hand = f"fetch {url} by hand and put it at {path}"
    if path.exists():
        return
    if offline or fcntl is None:
        raise FileNotFoundError(f"{path} is missing, and downloads are off; {by_hand}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab", buffering=0) as file:
            # a second process waits here for the first one's file; some network disks have no locks
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():
                part.unlink(missing_ok=True)
                return
            with_retries(lambda: transfer(url, file, tag), path.name, attempts, pause)
            if check:
                try:
                    check(part)
                except ValueError as error:
                    file.truncate(0)
                    raise Failure(f"not the published file: {error}", again=False) from error
            os.fsync(file.fileno())
            os.replace(part, path)
            tag.unlink(missing_ok=True)
    except Failure as failure:
        raise FileNotFoundError(f"{path} is missing, no download ({failure}); {by_hand}") from None
    except OSError as error:
        raise OSError(f"{path} cannot be stored ({error.strerror or error}); free some space, name another "
                      f"folder or {by_hand}") from None


def transfer(url: str, file: BinaryIO, tag: Path) -> None:
    """Append to `file` what it lacks of url, or start it afresh where the server has another file by now."""
    have = file.seek(0, os.SEEK_END)
    known = tag.read_text() if have and tag.exists() else ""
    # If-Range: the rest of the file if it still is the one with this tag, else the whole of the new one
    headers = {"Range": f"bytes={have}-", "If-Range": known} if known else {}
    try:
        with answer_to(url, headers, reached=have > 0) as answer:
            part = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if answer.status != 206 or not part:
                have = file.truncate(0)
                if answer.status != 200:
                    raise Failure(f"the server answered {answer.status}", again=True)
                tag.write_text(answer.headers.get("ETag", ""))
            write_body(answer, file, have, tag.name.removesuffix(".part.tag"))
    except Failure as failure:
        refusal = failure.__cause__
        if isinstance(refusal, urllib.error.HTTPError) and refusal.code == 416:     # nothing from there on
            if refusal.headers.get("Content-Range") == f"bytes */{have}":
                return
            file.truncate(0)
        raise


def write_body(answer: http.client.HTTPResponse, file: BinaryIO, have: int, name: str) -> None:
    """The answer's body to the end of `file`, which holds `have` bytes, with a progress line now and then."""
    total = None if answer.length is None else have + answer.length
    start, begun = have, time.monotonic()
    shown = begun
    while chunk := answer.read(CHUNK):
        if have == 0 and chunk.lstrip()[:1] == b"<":
            raise Failure("the server sent a web page in place of the file", again=False)
        rest = memoryview(chunk)
        while rest:
            rest = rest[file.write(rest):]
        have += len(chunk)
        now = time.monotonic()
        if have == total or now - shown > (1 if sys.stderr.isatty() else 10):
            shown = now
            show_progress(name, have, total, (have - start) / max(now - begun, 1e-9))
    # http.client ends a short body without complaint, so its length is checked here
    if total is not None and have < total:
        raise Failure(f"the connection ended after {have:,} of {total:,} bytes", again=True)


def show_progress(name: str, have: int, total: int | None, rate: float) -> None:
    """One line on stderr; have and total in bytes, rate in bytes a second."""
    left = f" of {total / 1e6:.1f} MB, {(total - have) / max(rate, 1):.0f} s left" if total else " MB"
    end = "\r" if sys.stderr.isatty() and have != total else "\n"
    print(f"{name}: {have / 1e6:.1f}{left}   ", end=end, file=sys.stderr, flush=True)


# ---- members of an archive ---------------------------------------------------------------------------------

class RemoteFile(io.RawIOBase):
    """A file on a server that answers range requests, seekable, so that zipfile can read it in place."""

    def __init__(self, url: str):
        self.url = url
        self.position = 0
        with answer_to(url, {"Range": "bytes=0-0"}, reached=False) as answer:
            size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if not size.isdigit():
                raise Failure("the server does not send parts of files", again=False)
            self.size = int(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        with answer_to(self.url, {"Range": f"bytes={self.position}-{end - 1}"}, reached=True) as answer:
            content = answer.read(end - self.position)
        if answer.status != 206 or not content:
            raise Failure("the server did not send the part asked for", again=True)
        buffer[:len(content)] = content     # of a broken answer the beginning; the reader asks for the rest
        self.position += len(content)
        return len(content)


def read_members(url: str, names: Sequence[str], attempts: int = 4, pause: float = 1.0) -> dict[str, bytes]:
    """Members of a zip archive on a server, by name, without fetching the rest of it (for ARC: 1 MB of 680).

    Nothing is unpacked to the disk. Raises FileNotFoundError where the source does not give them.
    """
    def work() -> dict[str, bytes]:
        with zipfile.ZipFile(io.BufferedReader(RemoteFile(url), CHUNK)) as archive:
            members = [archive.getinfo(name) for name in names]
            if any(member.file_size > LARGEST_MEMBER for member in members):
                raise Failure("a member of the archive is larger than it should be", again=False)
            return {member.filename: archive.read(member) for member in members}

    try:
        return with_retries(work, url.rpartition("/")[2], attempts, pause)
    except Failure as failure:
        raise FileNotFoundError(f"{url}: {failure}") from failure
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise FileNotFoundError(f"{url}: not the archive expected: {error}") from error
