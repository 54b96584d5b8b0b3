"""files.py: a message stops nobody, a file is whole or not there, a folder has one owner."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import files
from conftest import ROOT
from fake_runs import write_runs
from files import (Progress, atomic_write, complain, counted, delete_folders, duration, owned, read_lines,
                   say, tell, write_json)


@contextlib.contextmanager
def full_disk(largest: int):
    """No file can grow beyond this many bytes, as if the disk were full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- the terminal ------------------------------------------------------------------------------------------

def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def closed_stream():
    stream = io.StringIO()
    stream.close()
    return stream


class Interrupted(io.StringIO):
    """A stream in the middle of a write when a signal comes, whose handler wants to write, too."""

    def write(self, text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")


@pytest.mark.parametrize("stream", [
    broken_pipe, closed_stream, Interrupted, lambda: open("/dev/full", "w"), lambda: None])
def test_a_message_that_cannot_be_written_is_dropped(monkeypatch, stream):
    """Catches: a run of thirty hours that ends because its terminal went away or the disk of its log filled
    up, and a Ctrl-C during a slow write that ends in a traceback."""
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(sys, "stdout", stream())
    for _ in range(3):
        say("step 5 of 10")
        tell("a result")
        complain(ValueError("an error"))
    files.drop_all_unwritten()    # what Python does at the end: nothing may be left that raises there
    for kept in (sys.stdout, sys.stderr):
        if kept is not None and not kept.closed:
            kept.close()


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    """Catches: a whole report that is dropped for one letter, on a terminal that knows ASCII alone or where a
    file holds half a surrogate pair."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    tell("Ω of 5 \ud800")
    assert sys.stdout.buffer.getvalue() == b"\\u03a9 of 5 \\ud800\n"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    tell("Ω of 5 \ud800")
    assert sys.stdout.buffer.getvalue() == "Ω of 5 \\ud800\n".encode()


def test_an_error_is_one_line_and_a_list_a_line_an_entry(capsys):
    """Catches: a message with tabs, runs of blanks or empty lines of some library inside it."""
    complain(ValueError("a \t b\nc   d\n"))
    assert capsys.readouterr().err == "error: a b\n  c d\n"


@pytest.mark.parametrize("value, words", [
    (duration(0.4), "0 s"), (duration(89), "89 s"), (duration(90), "2 min"), (duration(5399), "90 min"),
    (duration(5400), "2 hours"), (duration(108000), "30 hours"),
    (counted(1, "step"), "1 step"), (counted(0, "step"), "0 steps"), (counted(1000, "step"), "1,000 steps")])
def test_amounts_in_words(value, words):
    """Catches: "1 questions", and a minute called an hour."""
    assert value == words


def test_the_time_left_is_what_the_work_still_takes(monkeypatch, capsys):
    """At 2 s a unit of work, on a clock of our own, the time left is twice what is left, wherever it began.

    Catches: a time left that is of the work done, that counts units of an earlier process as done in this
    one's time, that appears where the end is not known, or turns negative at the end; a line at every step.
    """
    now = [100.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])

    def lines_of(progress, done, seconds=lambda done: None) -> list[str]:
        for number in done:
            now[0] += 2.0
            progress.tick(number, f"unit {number}", seconds(number))
        return capsys.readouterr().err.splitlines()

    lines = lines_of(Progress(30), range(1, 31))
    left = [int(re.fullmatch(r"unit (\d+), about (\d+) s left", line)[2]) for line in lines]
    assert left == [2 * (30 - done) for done in range(1, 31)]
    resumed = lines_of(Progress(30), range(21, 32), seconds=lambda done: 2.0 * done)
    assert [line.split("about ")[1] for line in resumed] == [
        f"{2 * max(0, 30 - done)} s left" for done in range(21, 32)]
    assert lines_of(Progress(), [1]) == ["unit 1"] and lines_of(Progress(30), [0]) == ["unit 0"]
    progress = Progress(1000)
    monkeypatch.setattr(files, "SECONDS_BETWEEN_LINES", 20)
    assert len(lines_of(progress, range(1, 101))) == 10


# ---- the commands, at a terminal ---------------------------------------------------------------------------

def environment_of_a_user() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


@pytest.mark.parametrize("script, argv", [("train.py", "--list"), ("eval.py", "R2")])
def test_a_reader_that_goes_away_ends_a_listing_quietly(tmp_path, script, argv):
    """`train.py --list | head -1` and `eval.py | head -1` show a line and nothing else.

    Catches: "Broken pipe", as an error or as what Python complains about at its end, and another exit code.
    """
    write_runs(tmp_path, "R2", range(6), n=2, settings={"steps": 1})
    command = f"{sys.executable} {ROOT / script} {argv} --runs {tmp_path} 2>{tmp_path}/err"
    pipe = f"{command} | head -1; echo $PIPESTATUS"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, env=environment_of_a_user())
    line, code = done.stdout.splitlines()
    assert line.startswith("R2: ") and code == "0" and (tmp_path / "err").read_text() == done.stderr == ""


@pytest.mark.parametrize("script, moments", [
    ("train.py", ["argparse", "torch._C", "report"]), ("eval.py", ["argparse", "report"])])
def test_ctrl_c_in_the_first_second_is_a_stop(tmp_path, script, moments):
    """Ctrl-C while a command imports torch, whose modules Python names as they come, is one line.

    Catches: a traceback from inside some library. (Before the first of our lines, Python itself answers.)
    """
    for moment in moments:
        command = [sys.executable, "-X", "importtime", str(ROOT / script), "--runs", str(tmp_path)]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment_of_a_user())
        for line in child.stderr:
            if line.split("|")[-1].strip() == moment:
                child.send_signal(signal.SIGINT)
                break
        said = [line for line in child.stderr if not line.startswith("import time:")]
        assert (said, child.wait()) == (["stopped\n"], 130), moment


# ---- files -------------------------------------------------------------------------------------------------

def test_writes_bytes_and_text(tmp_path):
    """Catches: text in the machine's encoding, a missing folder, a file that only its owner can read, and a
    temporary name made of the target's alone, which two writers would share."""
    path = tmp_path / "new" / "folder" / "a"
    with atomic_write(path) as one:
        one.write(b"\x00\xff")
        with atomic_write(str(path), "w") as two:
            two.write("Ω\n")
        assert path.read_bytes() == "Ω\n".encode()
    assert path.read_bytes() == b"\x00\xff" and path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["a"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Catches: a file that is renamed first, and is empty under its final name after a power cut."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with atomic_write(tmp_path / "run.json", "w") as file:
        file.write("{}")
    assert calls == ["fsync", "replace"] and (tmp_path / "run.json").read_text() == "{}"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("before", [["model.pth"], []])
def test_an_interrupted_write_leaves_everything_as_it_was(tmp_path, error, before):
    """Catches: half a file under its final name, a lost old one, a temporary one left (Ctrl-C too), and an
    error that names another file than the one that was to be written."""
    for name in before:
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "model.pth") as file:
        file.write(b"half of the new")
        file.flush()
        raise error
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "new"):    # the renaming fails, and the beginning
        with pytest.raises(OSError, match=f"{path} cannot be written: "), atomic_write(path):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", *before]
    assert all((tmp_path / name).read_bytes() == b"old" for name in before)


def test_a_full_disk_leaves_everything_as_it_was(tmp_path):
    """Catches: a short file renamed into place, and an error without a name or a reason."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"old")
    with full_disk(300_000):
        for size in (300_001, 1_000_000):    # fails at the flush, and before
            with pytest.raises(OSError, match=f"{path} cannot be written: File too large"):
                with atomic_write(path) as file:
                    file.write(bytes(size))
    assert os.listdir(tmp_path) == ["records.jsonl"] and path.read_bytes() == b"old"


def test_a_reader_never_sees_a_part(tmp_path):
    """Catches: writing in place, where a reader in between would find half a file."""
    path = tmp_path / "metrics.jsonl"
    contents = [bytes([letter]) * 200_000 for letter in b"ab"]
    path.write_bytes(contents[0])

    def write():
        for turn in range(40):
            with atomic_write(path) as file:
                file.write(contents[turn % 2][:100_000])
                file.flush()
                file.write(contents[turn % 2][100_000:])

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert path.read_bytes() in contents


def test_lines_are_read_as_json_has_them(tmp_path):
    """Catches: a line cut at U+2028, U+2029 or U+0085 inside a string, a byte-order mark taken for damage, a
    blank line taken for a record, line numbers that count from 0 or leave blank lines out."""
    path = tmp_path / "lines.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y\u2029z\x85"}\r\n\n  \n{"a": 2}', encoding="utf-8")
    assert read_lines(path) == [(1, '{"a": "x\u2028y\u2029z\x85"}'), (4, '{"a": 2}')]
    write_json(path, [{"a": "\u2028"}, {"a": 2}])
    assert [number for number, _ in read_lines(path)] == [1, 2]


# ---- folders -----------------------------------------------------------------------------------------------

def test_a_folder_has_one_owner_and_leftovers_go(tmp_path):
    """A folder that another process owns is refused; once that one is killed, it is free and swept.

    Catches: two runs in one folder, a lock that outlives its process, half-written files and copies of a
    killed run that stay for good, and files of other names that are swept with them.
    """
    ready, told = os.pipe()
    owner = os.fork()
    if owner == 0:
        with owned(tmp_path), atomic_write(tmp_path / "no_fs" / "model.pth"):
            (tmp_path / ".copy-12345678" / "no_fs").mkdir(parents=True)
            os.write(told, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(ValueError, match=f"another process is already working in {tmp_path}.*--runs"):
        with owned(tmp_path):
            pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    for kept in ("model.pth", ".hidden", "a.12345678"):
        (tmp_path / "no_fs" / kept).write_text("")
    assert len(os.listdir(tmp_path / "no_fs")) == 4
    for _ in range(2):
        with owned(tmp_path):
            assert sorted(os.listdir(tmp_path / "no_fs")) == [".hidden", "a.12345678", "model.pth"]
            assert not list(tmp_path.glob(".copy-*"))
    with pytest.raises(OSError, match="no_fs/model.pth/R cannot be written: .*--runs"):
        with owned(tmp_path / "no_fs/model.pth/R"):
            pass


@pytest.mark.parametrize("lose", [
    lambda folder: shutil.rmtree(folder), lambda folder: folder.rename(folder.with_name("moved")),
    lambda folder: shutil.rmtree(folder.parent), lambda folder: (folder / ".lock").unlink()])
def test_an_owner_notices_that_its_folder_is_gone(tmp_path, lose):
    """Whatever happens to the folder, its owner is told so before it writes, and a new owner keeps it.

    Catches: two runs that both believe they own a folder that was deleted and made again, one of which
    overwrites the other's work; and a first owner that takes the second one's lock away as it leaves.
    """
    folder = tmp_path / "R2" / "seed1"
    with owned(folder) as check_owner:
        (folder / "no_fs").mkdir()
        check_owner()
        lose(folder)
        with pytest.raises(ValueError, match=f"{folder} was deleted or replaced .*Start it again"):
            check_owner()
        new_owner = owned(folder)
        check_new_owner = new_owner.__enter__()
        with pytest.raises(ValueError, match="was deleted or replaced"):
            check_owner()
    check_new_owner()
    with pytest.raises(ValueError, match="another process is already working"), owned(folder):
        pass
    new_owner.__exit__(None, None, None)
    with owned(folder):
        pass


def test_deleting_follows_no_links(tmp_path):
    """Catches: --fresh that deletes what a link points to, or one arm before it refuses the other."""
    for name in ("there/no_fs", "seed1/prompt_fs", "seed2/no_fs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.pth").write_text("work")
    (tmp_path / "seed1/no_fs").symlink_to(tmp_path / "there/no_fs")
    (tmp_path / "seed3").symlink_to(tmp_path / "there")
    delete_folders([tmp_path / "seed2/no_fs", tmp_path / "seed2/prompt_fs"])
    for link, arms in (("seed1/no_fs", ["seed1/prompt_fs", "seed1/no_fs"]), ("seed3", ["seed3/no_fs"])):
        with pytest.raises(ValueError, match=f"{tmp_path / link} is a link"):
            delete_folders([tmp_path / arm for arm in arms])
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("model.pth"))
    assert left == ["seed1/prompt_fs/model.pth", "there/no_fs/model.pth"]
