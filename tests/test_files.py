"""files.py: whole files or none, one owner a folder, runs read back, twins, progress."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import files
from files import (ARMS, Progress, atomic_write, clear, copy_twin, locked, read_round, read_run,
                   save_tensors, seeds_on_disk, status_of, twin_key, write_json)


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


# ---- files and folders -------------------------------------------------------------------------------------

def test_writes_bytes_and_text(tmp_path):
    """Catches text in the machine's encoding, a missing folder, a file that only its owner can read, and a
    temporary name made of the target's alone, which two writers would share."""
    path = tmp_path / "new" / "folder" / "a"
    with atomic_write(path) as one:
        one.write(b"\x00\xff")
        with atomic_write(str(path), "w") as two:
            two.write("Ω\n")
        assert path.read_bytes() == "Ω\n".encode()
    assert path.read_bytes() == b"\x00\xff" and path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("before", [["model.pth"], []])
def test_an_interrupted_write_leaves_everything_as_it_was(tmp_path, error, before):
    """Catches half a file under its final name, a lost old one, a temporary one left (Ctrl-C too)."""
    for name in before:
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "model.pth") as file:
        file.write(b"half of the new")
        file.flush()
        raise error
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "folder"):    # the renaming is what fails
        pass
    assert sorted(os.listdir(tmp_path)) == ["folder", *before]
    assert all((tmp_path / name).read_bytes() == b"old" for name in before)


def test_a_stop_while_torch_saves_is_a_stop(tmp_path):
    """Catches torch's own error, of an archive that was not finished, in the place of Ctrl-C."""
    class Stopping(torch.Tensor):
        def __reduce_ex__(self, protocol):
            raise KeyboardInterrupt(2)

    class Failing:
        def __exit__(self, *_):
            raise RuntimeError("unexpected pos 7552 vs 7446")

        def __enter__(self):
            pass

    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "model.pth"), Failing():
        raise KeyboardInterrupt(2)
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"x": Stopping()}, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_a_lack_of_memory_is_no_damage(tmp_path):
    """Catches the advice to start over, with --fresh, where a checkpoint is whole and only memory lacks."""
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"), files.damage_told(tmp_path):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def test_a_full_disk_leaves_everything_as_it_was(tmp_path):
    """Catches a short file renamed into place, and torch's RuntimeError, which nobody turns into one line."""
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    with full_disk(300_000):
        for size in (300_001, 1_000_000):    # fails at the flush, and before
            with pytest.raises(OSError, match="File too large"), atomic_write(path) as file:
                file.write(bytes(size))
        with pytest.raises(OSError, match=f"{path}: cannot be written"):
            save_tensors({"w": torch.zeros(100_000)}, path)
    assert os.listdir(tmp_path) == ["model.pth"] and path.read_bytes() == b"old"


def test_a_reader_never_sees_a_part(tmp_path):
    """Catches writing in place: a reader in between would find half a file."""
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


def test_a_folder_has_one_owner(tmp_path):
    """Catches two runs in one folder, a lock that outlives its process, what a killed one left half done."""
    ready, told = os.pipe()
    owner = os.fork()
    if owner == 0:
        with locked(tmp_path), atomic_write(tmp_path / "no_fs" / "model.pth"):
            os.write(told, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(ValueError, match=f"{tmp_path}: another process is at work"), locked(tmp_path):
        pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    for kept in ("model.pth", ".hidden", "a.12345678"):
        (tmp_path / "no_fs" / kept).write_text("")
    assert len(os.listdir(tmp_path / "no_fs")) == 4
    with pytest.raises(OSError, match="no_fs/model.pth/R: cannot be"), locked(tmp_path / "no_fs/model.pth/R"):
        pass
    for _ in range(2):
        with locked(tmp_path):
            assert sorted(os.listdir(tmp_path / "no_fs")) == [".hidden", "a.12345678", "model.pth"]


def test_clear_follows_no_links(tmp_path):
    """Catches --fresh that deletes what a link points to, or the arm that was not asked for."""
    for name in ("there/no_fs", "seed1/prompt_fs", "seed2/no_fs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.pth").write_text("work")
    (tmp_path / "seed1/no_fs").symlink_to(tmp_path / "there/no_fs")
    (tmp_path / "seed3").symlink_to(tmp_path / "there")
    clear(tmp_path / "seed2", list(ARMS))
    for seed, link in (("seed1", "seed1/no_fs"), ("seed3", "seed3")):
        with pytest.raises(ValueError, match=f"{link} is a link"):
            clear(tmp_path / seed, ["no_fs"])
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("model.pth"))
    assert left == ["seed1/prompt_fs/model.pth", "there/no_fs/model.pth"]
    clear(tmp_path / "seed1", ["prompt_fs"])
    assert not (tmp_path / "seed1/prompt_fs").exists()


# ---- runs, read back ---------------------------------------------------------------------------------------

HERE = {"code": "c0de", "machine": {"cpu": "AVX2", "threads": 1}}
SETTINGS = {"lr": 3e-5, "steps": 10, "fs_layer_start": 6, "alpha_init": -2.0}


def identity_of(name: str, seed: int, arm: str, **changes) -> dict:
    return {"round": name, "seed": seed, "arm": arm, "standin": False, "settings": SETTINGS, "minutes": None,
            "base": {"name": "base.pth", "sha256": "b"}, "data": {"train": "t", "validation": "v"}} | changes


def write_seed(runs: Path, name: str = "R8", seed: int = 0, n: int = 5, **changes) -> Path:
    """Both arms of a seed as train.py leaves them: (i + arm + seed) % 5 of example i's 4 tokens are right."""
    folder = runs / name / f"seed{seed}"
    for number, arm in enumerate(ARMS):
        identity = identity_of(name, seed, arm, **changes)
        lines = {"records": [], "controls": []}
        for i in reversed(range(n)):
            for step, control in ((0, None), (10, None), (10, "off"), (10, "other")):
                correct = {"off": 1, "other": 2}.get(control, (i + number + seed) % 5)
                lines["controls" if control else "records"].append({
                    "step": step, "control": control, "id": f"q{i}", "loss": 0.5 + correct, "tokens": 4,
                    "correct": correct, "exact": int(correct == 4), "f1": correct / 4})
        (folder / arm).mkdir(parents=True)
        write_json(folder / arm / "run.json", [{
            **identity, "twin": twin_key(identity, HERE), "status": "done", "steps": 10,
            "history": [{"from_step": 0, **HERE}]}], indent=1)
        write_json(folder / arm / "records.jsonl", lines["records"])
        (folder / arm / "model.pth").write_text(arm)
        if arm == "prompt_fs":
            write_json(folder / arm / "controls.jsonl", lines["controls"])
            (folder / arm / "fs.pth").write_text(arm)
    return folder


def change_run(folder: Path, **changes) -> None:
    write_json(folder / "run.json", [{**json.loads((folder / "run.json").read_text()), **changes}], indent=1)


def test_a_round_comes_back_as_written(tmp_path):
    """Catches scores that land at another example, arm, seed or step, and seed02 read as another seed 2."""
    for seed in (10, 2):
        write_seed(tmp_path, seed=seed)
    for other in ("seed02", "seed-1", "seed", "seed2.old", "seed²"):
        (tmp_path / "R8" / other).mkdir()
    (tmp_path / "R8/seed3").write_text("no folder")
    assert seeds_on_disk(tmp_path / "R8") == [2, 10]
    found, notes, damaged = read_round(tmp_path / "R8")
    for seed, (runs, last, controls) in found.items():
        for arm in range(2):
            right = {f"q{i}": (i + arm + seed) % 5 for i in range(5)}
            assert last[arm] == {id: [x / 4, 0.5 + x, x == 4, x / 4] for id, x in right.items()}
            assert runs[arm] == read_run(tmp_path / f"R8/seed{seed}" / ARMS[arm])
        assert {name: {values[0] for values in by_id.values()} for name, by_id in controls.items()} == {
            "off": {0.25}, "other": {0.5}}
    assert list(found) == [2, 10] and notes == damaged == []
    assert list(read_round(tmp_path / "R8", seeds=[10])[0]) == [10]


BIG, DEEP = "1" + 400 * "0", "[" * 100_000
COMMON = [("(?s).*", ""), ("(?s).*", "[]"), ("^", DEEP), (r"\}\s*$", ""), ("^", "\ufeff")]
DAMAGES = {    # file: what is replaced in it, by what
    "run.json": COMMON + [
        ('"seed": 0', f'"seed": {BIG}'), ('"seed": 0', '"seed": 1'), ('"round": "R8"', '"round": "R6"'),
        ('"status"', '"other"'), ('"steps": 10,(?=\n "hist)', '"steps": null,'), ('"no_fs"', '"prompt_fs"')],
    "records.jsonl": COMMON + [
        *(('"loss": 4.5', f'"loss": {loss}') for loss in (BIG, "NaN", "Infinity", "-1.0", '"1"')),
        ('"correct": 4', f'"correct": {BIG}'), ('"tokens": 4, "correct": 4', '"tokens": 0, "correct": 0'),
        ('"correct": 4', '"correct": 5'), ('"exact": 1', '"exact": 0.5'), ('"f1": 1.0', '"f1": 1.1'),
        ('"step": 0', '"step": []'), ('"id": "q4"', '"id": null'),
        ("^(.*\n)", r"\1\1"), ('"step": 0', '"step": 10'),    # an example twice
        ("^.*\n", "")],                 # an evaluation lacks one
    "controls.jsonl": COMMON + [("^.*\n", "")],
}


@pytest.mark.parametrize("file", DAMAGES)
def test_a_damaged_seed_is_left_out_and_told(tmp_path, file):
    """Catches a damaged file averaged, a traceback, and one bad seed that hides the others."""
    path = write_seed(tmp_path, seed=0) / ARMS[file == "controls.jsonl"] / file
    write_seed(tmp_path, seed=1)
    whole = path.read_text()
    for pattern, new in DAMAGES[file]:
        path.write_text(re.sub(pattern, new, whole, count=1))
        assert path.read_text() != whole, pattern
        found, notes, damaged = read_round(tmp_path / "R8")
        assert list(found) == [1] and len(damaged) == 1 and notes == [], (pattern, new)
        assert str(path) in damaged[0] and "\n" not in damaged[0]
    with pytest.raises(FileNotFoundError, match=f"no finished seed .{path}"):
        read_round(tmp_path / "R8", seeds=[0])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(LEAVES, lambda part: st.lists(part) | st.dictionaries(st.text(max_size=3), part))
KEYS = [*identity_of("R8", 0, "no_fs"), *"status steps history twin".split(),
        *"step id loss tokens correct exact f1 control".split()]


@settings(deadline=None, max_examples=40)
@given(key=st.sampled_from(KEYS), value=JSON, standin=st.booleans())
@example(key="history", value=[None], standin=False)
@example(key="history", value=[], standin=False)
@example(key="data", value={}, standin=True)
@example(key="seed", value="0", standin=False)
@example(key="steps", value=5, standin=False)
@example(key="id", value=None, standin=False)
def test_fuzzed_runs_are_read_or_refused(tmp_path_factory, key, value, standin):
    """Catches a value of an unforeseen kind, alike in both arms, that ends in a traceback."""
    runs = tmp_path_factory.mktemp("runs")
    folder = write_seed(runs, n=2, standin=standin)
    for arm in ARMS:
        change_run(folder / arm, **{key: value})
    for path in folder.glob("*/*.jsonl"):
        lines = map(json.loads, path.read_text().splitlines())
        write_json(path, [line | {key: value} if line["id"] == "q1" else line for line in lines])
    with contextlib.suppress(ValueError, FileNotFoundError):
        _, last, _ = read_round(runs / "R8")[0][0]
        scores = np.array([list(arm.values()) for arm in last])
        assert scores.shape == (2, 2, 4) and np.isfinite(scores).all()


def test_unfinished_seeds_are_left_out_with_a_note(tmp_path):
    """Catches a seed averaged at whatever step it has reached, and one that disappears without a word."""
    for seed in range(4):
        write_seed(tmp_path, seed=seed)
    change_run(tmp_path / "R8/seed0/no_fs", status="running", steps=5)
    missing = [tmp_path / "R8/seed1/prompt_fs/run.json", tmp_path / "R8/seed2/no_fs/records.jsonl"]
    for path in missing:
        path.unlink()
    found, notes, damaged = read_round(tmp_path / "R8", seeds=[0, 1, 2, 3, 4])
    assert list(found) == [3] and damaged == []
    reasons = {0: "no_fs stands at step 5", 1: str(missing[0]), 2: str(missing[1]), 4: "no_fs"}
    for (seed, reason), note in zip(reasons.items(), notes, strict=True):
        assert note.startswith(f"left out, not finished: seed {seed}") and reason in note
    with pytest.raises(FileNotFoundError, match="no finished seed .no runs"):
        read_round(tmp_path / "R6")


@pytest.mark.parametrize("changes, words", [
    ({"settings": SETTINGS | {"lr": 0.1}}, "lr.*3e-05 there, .*0.1"), ({"n": 4}, "questions|examples"),
    ({"minutes": 8.0}, "minutes.*8.0"), ({"standin": True}, "here"),
    ({"base": {"name": "base.pth", "sha256": "x"}}, "sha256.*x"),
    ({"data": {"train": "x", "validation": "v"}}, "train.*x"),
])
def test_unlike_runs_are_refused(tmp_path, changes, words):
    """Catches seeds or arms averaged that differ in more than their seed."""
    for seed in (0, 1):
        write_seed(tmp_path, seed=seed, **changes if seed else {})
    with pytest.raises(ValueError, match=f"seeds 0 and 1 cannot be compared.*({words})"):
        read_round(tmp_path / "R8")
    for name in ("run.json", "records.jsonl"):
        whole = (tmp_path / "R8/seed0/no_fs" / name).read_text()
        (tmp_path / "R8/seed1/no_fs" / name).write_text(whole.replace('"seed": 0', '"seed": 1'))
    assert re.search(f"seed1.*its arms .*({words})", read_round(tmp_path / "R8")[2][0])


def test_what_may_differ_is_told(tmp_path):
    """Catches runs of other code or another machine averaged in silence, the seeds of a stand-in refused for
    their own bases, and arms of unequal ends (by minutes) refused."""
    write_seed(tmp_path, seed=0, standin=True)
    write_seed(tmp_path, seed=1, standin=True, base={"name": "b1"}, data={"train": "u", "validation": "v"})
    assert read_round(tmp_path / "R8")[1] == []
    moved = {"from_step": 5, "code": "new", "machine": {"cpu": "AVX2", "threads": 2}}
    change_run(tmp_path / "R8/seed1/prompt_fs", history=[{"from_step": 0, **HERE}, moved], steps=0)
    found, (note,), _ = read_round(tmp_path / "R8")
    assert list(found) == [0, 1]
    assert re.search("seed 1 .*c0de.* there, .*new.* here; .*1 there, .*2 here", note)


def test_another_run_is_refused_in_one_short_line(tmp_path):
    """Catches a finished run overwritten by other settings, and an error of a thousand characters."""
    folder, wanted = write_seed(tmp_path) / "no_fs", identity_of("R8", 0, "no_fs")
    change_run(folder, settings=dict(reversed(SETTINGS.items())))    # another order is no difference
    assert status_of(folder, wanted) == "done" and status_of(tmp_path / "R8/seed9/no_fs", wanted) == "absent"
    for change, words in (({"lr": 0.1}, "lr.*3e-05 there, .*0.1 here"), ({"new": 1}, "new.*1 here")):
        with pytest.raises(ValueError, match=f"holds another run .*{words}"):
            status_of(folder, wanted | {"settings": SETTINGS | change})
    one, other = ({"base": {"name": letter * 400, "sha256": letter * 64},
                   "data": {"train": letter * 64, "validation": letter * 64}} for letter in "xy")
    change_run(folder, **one)
    with pytest.raises(ValueError, match="and 1 more.; --fresh replaces it, --runs DIR keeps both") as caught:
        status_of(folder, wanted | other)
    message = str(caught.value).replace(str(folder), "runs/standin/R8/seed0/no_fs")
    assert len(message) < 300 and message.count(" here") == 3, message


def test_a_twin_is_copied_whole_or_not_at_all(tmp_path):
    """Catches a twin with cut records or a missing file marked done, one of other code or another machine,
    and no_fs trained twice where two rounds differ in Future-Seed alone."""
    source, folder = write_seed(tmp_path, "R6") / "no_fs", tmp_path / "R8/seed0/no_fs"
    write_seed(tmp_path, "R4", minutes=1.0)    # these depend on the clock
    folder.parent.mkdir(parents=True)

    def copied(surroundings=HERE, folder=folder, **changes) -> bool:
        identity = identity_of("R8", 0, folder.name, **changes)
        done = copy_twin(folder, identity, twin_key(identity, surroundings))
        assert os.listdir(folder.parent) == [folder.name] * done
        return done

    assert not copied(HERE | {"code": "other"}) and not copied(HERE | {"machine": {"cpu": "AVX512"}})
    assert not copied(settings=SETTINGS | {"lr": 1.0}) and not copied(data={}) and not copied(minutes=1.0)
    assert not copied(folder=folder.with_name("prompt_fs"))
    for name in ("run.json", "records.jsonl", "model.pth"):
        (source / name).rename(tmp_path / "away")
        assert not copied(), name
        (tmp_path / "away").rename(source / name)
    records, run = (source / "records.jsonl").read_text(), read_run(source)
    for cut in (records[:-9], records[:records.rindex('{"step"')], ""):
        (source / "records.jsonl").write_text(cut)
        assert not copied()
    (source / "records.jsonl").write_text(records)
    for changes in ({"status": "running"}, {"history": [HERE, HERE]}, {"steps": 5}):
        change_run(source, **changes)
        assert not copied()
        write_json(source / "run.json", [run])
    changed = SETTINGS | {"fs_layer_start": 1, "alpha_init": 0.0}
    assert copied(settings=changed)
    assert read_run(folder) == {**run, "round": "R8", "settings": changed, "copied_from": "R6"}
    assert (folder / "records.jsonl").read_text() == records and (folder / "model.pth").exists()


def test_the_time_left_falls(monkeypatch, capsys):
    """Catches a time left that is of the work done, or of another unit, and a line at every step."""
    now = [100.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    progress = Progress(total=1000)
    for _ in range(50):
        now[0] += 1.0
        progress.tick(20, "at work")
    lines = capsys.readouterr().err.splitlines()
    left = [int(re.fullmatch(r"at work; about (\d+) s left in all", line)[1]) for line in lines]
    assert left == [47 - 3 * i for i in range(16)]
