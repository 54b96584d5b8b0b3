"""Files are written whole or not at all: exceptions, full disks, readers that look at the wrong moment."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from files import atomic_write, locked

ROOT = Path(__file__).resolve().parent.parent


def test_writes_bytes_and_text(tmp_path):
    """Catches text in the machine's encoding, a missing folder, a file that only its owner can read."""
    with atomic_write(tmp_path / "new" / "folder" / "a.bin") as file:
        file.write(b"\x00\xff")
    with atomic_write(str(tmp_path / "b.txt"), "w") as file:
        file.write("Ω\n")
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == "Ω\n".encode()
    assert (tmp_path / "b.txt").stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path / "new" / "folder") == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_write_leaves_everything_as_it_was(tmp_path, error, existing):
    """Catches half a file under its final name, a lost old one, a temporary one left (Ctrl-C too)."""
    path = tmp_path / "model.pth"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(error):
        with atomic_write(path) as file:
            file.write(b"half of the new")
            file.flush()
            assert not existing or path.read_bytes() == b"old"
            raise error
    assert os.listdir(tmp_path) == (["model.pth"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


def test_a_target_that_is_a_folder(tmp_path):
    """Catches a temporary file left behind when the last step, the renaming, is what fails."""
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError):
        with atomic_write(tmp_path / "target") as file:
            file.write(b"new")
    assert os.listdir(tmp_path) == ["target"]


def run_with_a_full_disk(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run code where no file can grow beyond 4096 bytes, as if the disk were full."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", limit + code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("write", [
    "file.write(b'x' * 5000)",                       # buffered: fails at the flush
    "file.write(b'x' * 10**6)",                      # unbuffered: fails at the write
])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, write):
    """Catches a short file renamed into place because a failed write or flush went unnoticed."""
    pytest.importorskip("resource")
    (tmp_path / "model.pth").write_bytes(b"old")
    code = f"from files import atomic_write\nwith atomic_write('model.pth') as file:\n    {write}\n"
    process = run_with_a_full_disk(tmp_path, code)
    assert process.returncode == 1 and "OSError" in process.stderr
    assert os.listdir(tmp_path) == ["model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == b"old"


def test_saving_a_model_on_a_full_disk(tmp_path):
    """Catches torch.save's own ways to fail: an abort, or an error nobody turns into one line."""
    pytest.importorskip("resource")
    (tmp_path / "model.pth").write_bytes(b"old")
    code = """
from model import Config, RWKV7
try:
    RWKV7.init(Config.published(1, 32, 16, 50)).save("model.pth")
except (ValueError, OSError) as error:
    print("one line:", error)
"""
    process = run_with_a_full_disk(tmp_path, code)
    assert os.listdir(tmp_path) == ["model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == b"old"
    assert process.returncode == 0 and process.stdout.startswith("one line:"), process.stderr[-500:]


def test_a_reader_never_sees_a_part(tmp_path):
    """Catches writing in place: a reader in between would find half a file."""
    path = tmp_path / "metrics.jsonl"
    contents = [bytes([letter]) * 200_000 for letter in b"ab"]
    path.write_bytes(contents[0])
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(60):
            with atomic_write(path) as file:
                for start in range(0, 200_000, 50_000):
                    file.write(contents[turn % 2][start : start + 50_000])
                    file.flush()
    finally:
        stop.set()
        reader.join()
    assert seen <= set(contents)


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    """Catches a temporary name made of the target alone: two runs would write into one another."""
    path = tmp_path / "a.txt"
    with atomic_write(path, "w") as one:
        one.write("one")
        with atomic_write(path, "w") as two:
            two.write("two, longer")
        assert path.read_text() == "two, longer"
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_report_does_not_wait_for_torch():
    """Catches an import that makes `python eval.py R8` seconds slower."""
    command = "import sys, eval; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    """Catches two runs in one folder, a lock that outlives its process, and what killed ones left behind."""
    folder = tmp_path / "arm"
    with locked(folder):
        with atomic_write(folder / "kept"):
            pass
        with pytest.raises(ValueError, match="another process"), locked(folder):
            pass
    child = os.fork()
    if child == 0:
        with locked(folder), atomic_write(folder / "checkpoint.pt"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(os.listdir(folder)) == 2
    with locked(folder):
        assert os.listdir(folder) == ["kept"]
