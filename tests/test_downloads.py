"""Downloads from servers that are slow, endless or wrong, all on the loopback address; and your own files.

test_data.py holds what a download must do where the server is sound.
"""

import json
import re
import socket
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest

import data
from tokenizer import Tokenizer

ARC = {Path(name).name: records for (task, _), (name, records) in data.FILES.items() if task == "arc"}
OWN = {"context": "Ann runs.", "question": "Ann", "answer": "runs"}


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Reading the vocabulary takes a third of a second, and load_own_examples reads it."""
    tokenizer = Tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Tokenizer", lambda: tokenizer)
        yield


@pytest.fixture
def serve():
    """serve(send) starts a server that calls send(connection) for every request, and returns its address."""
    listeners = []

    def answer(connection, send):
        with connection:
            try:
                connection.recv(65536)
                send(connection)
            except OSError:    # the reader hung up
                pass

    def accept(listener, send):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:    # the test is over
                return
            threading.Thread(target=answer, args=(connection, send), daemon=True).start()

    def start(send) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=accept, args=(listener, send), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/file"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def whole(content: bytes):
    """A sender of a file with its length."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    return lambda connection: connection.sendall(head + content)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name != ".lock" and path.is_file())


# ---- servers -----------------------------------------------------------------------------------------------

FAST_THEN_SLOW = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + bytes(1_000_000)


@pytest.mark.parametrize("start", [
    b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;",
    b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", FAST_THEN_SLOW,
], ids=["header", "chunk", "body", "fast, then slow"])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(serve, tmp_path, monkeypatch, start):
    """Wherever in its answer a server is slow, it is given up after the stated time, and nothing is left.

    Catches: a timeout that starts anew with every byte, so that a header is waited for without end; a mean
    over the whole download, for which a fast beginning excuses hours of nothing.
    """
    monkeypatch.setattr(data, "SECONDS_TO_BEGIN", 0.5)

    def trickle(connection):
        connection.sendall(start)
        while True:
            connection.sendall(b"1")
            time.sleep(0.05)

    begun = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"too slow: .* bytes in \d+ s. Download .* yourself and save it"):
        data.download(serve(trickle), tmp_path / "file", lambda file: None, offline=False)
    assert time.monotonic() - begun < 20
    assert files_in(tmp_path) == []


def test_a_server_that_sends_without_end_is_given_up(serve, tmp_path, monkeypatch):
    """A file without a promised length has a largest size. Catches: a disk filled to its end."""
    monkeypatch.setattr(data, "LARGEST_FILE", 1_000_000)

    def flood(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(bytes(65536))

    with pytest.raises(FileNotFoundError, match="does not stop sending"):
        data.download(serve(flood), tmp_path / "file", lambda file: None, offline=False)
    assert files_in(tmp_path) == []


# ---- ARC's archive -----------------------------------------------------------------------------------------

def arc_archive(path: Path, method: int = zipfile.ZIP_DEFLATED, first: bytes | None = None) -> bytes:
    """ARC's archive in small; `first` in place of the first file of the three."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, records in ARC.items():
            content = b'{"id": "1"}\n' * records
            if first is not None and name == next(iter(ARC)):
                content = first
            archive.writestr(data.ARC_FOLDER + name, content)
    return path.read_bytes()


def test_arc_is_unpacked_whole_and_your_own_file_is_kept(serve, tmp_path, monkeypatch):
    """Three files come at once, and one that is there stays; what a killed process left is swept before.

    Catches: a user's file overwritten by one of the same name; a download killed while it unpacked, whose
    folder in a folder could not be deleted, so that no later download began; a leftover that stays where
    nothing is missing any more.
    """
    folder = tmp_path / "assets" / "arc"
    leftover = folder / ".download-killed" / "unpacked" / "half a file"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("x")
    (folder / "ARC-Challenge-Dev.jsonl").write_text("mine")
    monkeypatch.setattr(data, "ARC_ARCHIVE", serve(whole(arc_archive(tmp_path / "zip"))))
    data.find_file("arc", "train", tmp_path / "assets", offline=False)
    assert files_in(folder) == sorted(ARC)
    assert (folder / "ARC-Challenge-Dev.jsonl").read_text() == "mine"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("x")
    data.find_file("arc", "train", tmp_path / "assets", offline=True)
    assert files_in(folder) == sorted(ARC)


def lying(content: bytes) -> bytes:
    """The archive with another size of its first file in every place that tells it: 3,000 bytes, not 40 MB."""
    assert content.count((40_000_000).to_bytes(4, "little")) == 2
    return content.replace((40_000_000).to_bytes(4, "little"), (3000).to_bytes(4, "little"))


@pytest.mark.parametrize("method, change", [
    (zipfile.ZIP_DEFLATED, lying), (zipfile.ZIP_LZMA, lying), (zipfile.ZIP_BZIP2, lying),
    (zipfile.ZIP_DEFLATED, lambda content: content[:-50]),
    (zipfile.ZIP_DEFLATED, lambda content: re.sub(b"(PK\1\2.{4})\0", rb"\1\1", content, flags=re.DOTALL)),
    (zipfile.ZIP_DEFLATED, lambda content: re.sub(b"(PK\1\2.{6})\10", rb"\1\143", content, flags=re.DOTALL)),
], ids=["a size that is a lie", "that, in LZMA", "that, in BZIP2", "cut off", "a password", "an odd method"])
def test_an_archive_that_is_wrong_is_refused_in_one_line(serve, tmp_path, monkeypatch, method, change):
    """Whatever is wrong, an error of one line says so, and no file and little memory is taken.

    Catches: zipfile's own errors as tracebacks; a member that is unpacked whole before its size is looked at.
    """
    content = change(arc_archive(tmp_path / "zip", method, first=bytes(40_000_000)))
    monkeypatch.setattr(data, "ARC_ARCHIVE", serve(whole(content)))
    tracemalloc.start()
    try:
        with pytest.raises(FileNotFoundError, match="could not download .*archive|compressed by") as caught:
            data.find_file("arc", "train", tmp_path / "assets", offline=False)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path / "assets") == []
    assert most < 20_000_000


# ---- your own questions ------------------------------------------------------------------------------------

def read_own(folder: Path, content: bytes, **changes):
    (folder / "train.jsonl").write_bytes(content)
    rules = dict(order="context_first", max_prompt=512, max_answer=8, n=3) | changes
    return data.load_own_examples(folder, "train", **rules)


GOOD_LINE = json.dumps(OWN).encode() + b"\n"


@pytest.mark.parametrize("second, words", [
    (b'{"context": ', "this is not JSON: Expecting value at character 13"),
    (b"[1]", "not a JSON object"), (b"[" * 100_000, "recursion"),
    (json.dumps(OWN | {"answer": 5}).encode(), "'answer' is missing or not a str"),
    (json.dumps(OWN | {"question": " "}).encode(), "'question' is empty"),
    (json.dumps(OWN | {"answer": "a\rb"}).encode(), "'answer' has a line break"),
    (json.dumps(OWN | {"id": True}).encode(), "'id' should be text or a whole number"),
    (json.dumps(OWN | {"id": 1}).encode(), "its id '1' is that of line 1. Give every line"),
    (b'{"context": "\xe9"}', "not UTF-8. Save it as UTF-8"),
])
def test_a_wrong_line_of_your_own_is_named(tmp_path, second, words):
    """The error names file and line, says what is wrong, and what to write. Catches: any that does not."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_own(tmp_path, GOOD_LINE + second)
    assert str(caught.value).startswith(f"{tmp_path / 'train.jsonl'}, line 2: ")
    assert "\n" not in str(caught.value)


def test_your_own_questions_are_counted(tmp_path, capsys):
    """It is said how many were read, of how many lines, and what was left out or cut, and why.

    Catches: a run on three of nine questions that reads as a run on all; a line that U+2028 cuts in two; a
    question that was cut away without a word.
    """
    odd = json.dumps(OWN | {"context": "a\u2028b\u0085c"}, ensure_ascii=False).encode() + b"\n"
    examples = read_own(tmp_path, b"\xef\xbb\xbf" + odd + 8 * GOOD_LINE)
    assert [example.id for example in examples] == ["1", "2", "3"]
    assert "train.jsonl: 3 questions, the first of 9 lines" in capsys.readouterr().err
    read_own(tmp_path, odd + GOOD_LINE, min_prompt=len(examples[0].prompt))
    assert "1 question; 1 more had fewer than min_prompt = " in capsys.readouterr().err
    read_own(tmp_path, GOOD_LINE, max_prompt=9)
    assert "1 of them had more than max_prompt = 9 tokens and lost their start" in capsys.readouterr().err
    read_own(tmp_path, GOOD_LINE, max_prompt=9, order="question_first")
    assert "lost the question, or a part of it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds 0 questions .* Lower min_prompt = 100: 1 prompt had fewer"):
        read_own(tmp_path, GOOD_LINE, min_prompt=100)
    with pytest.raises(ValueError, match="holds 0 questions .* Write at least 1, one JSON object a line"):
        read_own(tmp_path, b"\n")
