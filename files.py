"""The disk and the terminal: files whole or not at all, folders with one owner, runs read back, progress.

A run may be killed, a disk may fill up, two processes may race. So every file is written under a temporary
name, flushed to the disk, and only then renamed. And nothing damaged, unfinished or unlike is ever averaged.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Iterator

import torch
from filelock import FileLock, Timeout

SECONDS_BETWEEN_LINES = 2
NO_MEMORY = "DefaultCPUAllocator"    # in a RuntimeError: torch has no class for memory that a CPU lacks
ARMS = ("no_fs", "prompt_fs")
METRICS = ("acc", "loss", "EM", "F1")    # eval.py says what they are


# ---- the terminal ------------------------------------------------------------------------------------------

def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def complain(error: Exception | str) -> None:
    """An error on one line; where it is a list, on a line an entry."""
    say("error: " + "\n  ".join(" ".join(line.split()) for line in str(error).splitlines()))


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} hours"


class Progress:
    """How far a long piece of work is. What the work is counted in is the caller's to choose."""

    def __init__(self, total: float):
        self.total, self.done = total, 0.0
        self.started = self.shown = time.monotonic()

    def tick(self, work: float, text: str) -> None:
        """Count some more work as done and, every few seconds, say where that is and what time is left."""
        self.done += work
        now = time.monotonic()
        if now - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = now
            left = (now - self.started) / self.done * max(0.0, self.total - self.done)
            say(f"{text}; about {duration(left)} left in all")


# ---- files and folders -------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open, as "wb" or "w" (UTF-8), a temporary file that becomes `path` when the block ends well.

    If the block raises, `path` keeps what it held and the temporary file is removed. OSError, which names
    `path`, where it cannot be written: for a full disk, too, which torch calls a RuntimeError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o644)     # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):    # torch.save tells an error of its own
            raise error.__context__
        if isinstance(error, (OSError, RuntimeError)):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:80]
            raise OSError(f"{path}: cannot be written ({reason}); what was saved before is kept") from error
        raise


def save_tensors(value, path: str | Path) -> None:
    """torch.save, whole or not at all."""
    with atomic_write(path) as file:
        torch.save(value, file)


def write_json(path: Path, values: list[dict], indent: int | None = None) -> None:
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(value, indent=indent) + "\n" for value in values)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own a folder, made if need be, or raise ValueError; delete what a killed owner left half written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another process is at work; wait for it, or use --runs DIR") from None
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror}); use --runs DIR") from None
    with lock:
        for leftover in folder.glob("*/.*.????????"):
            leftover.unlink()
        yield


def clear(folder: Path, arms: list[str]) -> None:
    """Delete what arms left in a seed's folder. ValueError where a link would lead elsewhere."""
    places = [folder / arm for arm in arms]
    for path in filter(Path.is_symlink, [folder, *places]):
        raise ValueError(f"{path} is a link, and --fresh follows none; delete it by hand")
    for path in filter(Path.exists, places):
        shutil.rmtree(path)


# ---- what a run is -----------------------------------------------------------------------------------------

def differences(there, here, name: str) -> list[str]:
    """Where two nested dicts differ, as ["settings.lr: 1e-05 there, 3e-05 here"]."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [line for key in {**there, **here}
                for line in differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))]
    return [] if there == here else [f"{name}: {str(there)[:16]} there, {str(here)[:16]} here"]


def in_words(there: dict, here: dict) -> str:
    """The first few of their differences; "" where there are none."""
    found = differences(there, here, "")
    return "; ".join(found[:3] + [f"and {len(found) - 3} more"] * (len(found) > 3))


def refuse_another(place: Path, found: dict, wanted: dict) -> None:
    """Raises ValueError unless what was found on the disk has all that the wanted run's identity says."""
    other = in_words({key: found.get(key) for key in wanted}, wanted)
    if other:
        raise ValueError(f"{place} holds another run ({other}); --fresh replaces it, --runs DIR keeps both")


class Damaged(ValueError):
    """A file does not hold what it should."""


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Whatever goes wrong while something is read and taken apart is one line that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, Damaged)) or NO_MEMORY in str(error):
            raise
        raise Damaged(f"{path}: damaged ({error!r:.100}); run this arm again with --fresh") from error


def read_run(folder: Path) -> dict:
    """An arm's run.json. ValueError names the file; FileNotFoundError where there is none."""
    with damage_told(folder / "run.json"):
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        here = [run["round"], f"seed{run['seed']}", run["arm"]]
        if here != list(folder.absolute().parts[-3:]):
            raise ValueError(f"it is {'/'.join(here)}'s")
        told = run["history"] and all({"code", "machine"} <= entry.keys() for entry in run["history"])
        if run["status"] not in ("running", "done") or type(run["steps"]) is not int or not told:
            raise ValueError("status, steps or history")
        same_of(run, across_seeds=True)    # or it lacks something of what runs are compared by
    return run


def status_of(folder: Path, identity: dict) -> str:
    """An arm's status: absent, running or done. Raises ValueError where it is another run's."""
    if not (folder / "run.json").exists():
        return "absent"
    run = read_run(folder)
    refuse_another(folder, run, identity)
    return run["status"]


def twin_key(identity: dict, surroundings: dict) -> str:
    """A hash of all that decides the bits of an arm without Future-Seed, whatever its round is called."""
    settings = {key: value for key, value in identity["settings"].items()
                if not key.startswith(("fs_", "alpha_"))}
    decisive = {**identity, **surroundings, "round": None, "settings": settings, "from_step": None}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def copy_twin(folder: Path, identity: dict, twin: str) -> bool:
    """Take over another round's no_fs, if it is the same and whole, as R8 does R6's; was there one?

    Budgets in minutes depend on the clock and have no twins, nor has what was resumed in other surroundings.
    """
    if identity["minutes"] is not None or folder.name != "no_fs":
        return False
    for path in sorted(folder.parents[2].glob(f"*/{folder.parent.name}/no_fs")):
        with (contextlib.suppress(ValueError, OSError),    # damaged or being deleted: its round complains
              tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary):
            run = read_run(path)
            if run["status"] == "done" and run.get("twin") == twin and len(run["history"]) == 1:
                copy = Path(shutil.copytree(path, Path(temporary, folder.name)))
                if run["steps"] in read_records(copy / "records.jsonl") and (copy / "model.pth").exists():
                    run = {**run, **identity, "copied_from": run["round"]}
                    write_json(copy / "run.json", [run], indent=1)
                    copy.rename(folder)
                    say(f"{folder}: the same run as {path}, copied from there")
                    return True
    return False


# ---- runs, read back ---------------------------------------------------------------------------------------

def read_records(path: Path, by: str = "step") -> dict[int | str, dict[str, list[float]]]:
    """records.jsonl as {step: {id: values of METRICS}}; controls.jsonl likewise, by "control"."""
    evaluations = {}
    with damage_told(path):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            record = json.loads(line)
            id, loss, exact, f1 = record["id"], record["loss"], record["exact"], record["f1"]
            correct, tokens = record["correct"], record["tokens"]
            evaluation = evaluations.setdefault(record[by], {})
            if not (0 <= correct <= tokens and 0 <= loss < 1e30 and exact in (0, 1) and 0 <= f1 <= 1
                    and type(id) is str and id not in evaluation):
                raise ValueError(f"line {number} has a value that cannot be, or an example again")
            evaluation[id] = [correct / tokens, loss, exact, f1]
        if len({frozenset(evaluation) for evaluation in evaluations.values()}) != 1:
            raise ValueError("an evaluation lacks examples")
    return evaluations


def same_of(run: dict, across_seeds: bool) -> dict:
    """What must not differ between runs. On the stand-in a seed has its own base and training questions."""
    own = {"base": None, "data": run["data"]["validation"]} if across_seeds and run["standin"] else {}
    return {key: run[key] for key in ("standin", "settings", "minutes", "base", "data")} | own


def read_seed(folder: Path) -> tuple[list[dict], list[dict], dict]:
    """Both arms of a seed: their run.json, their last evaluations, the controls of prompt_fs.

    Raises OSError where an arm is not finished, ValueError where it is damaged or unlike the other.
    """
    runs = [read_run(folder / arm) for arm in ARMS]
    for run in runs:
        if run["status"] != "done":
            raise OSError(f"{folder / run['arm']} stands at step {run['steps']}")
    with damage_told(folder):
        last = [read_records(folder / run["arm"] / "records.jsonl")[run["steps"]] for run in runs]
        unlike = in_words(same_of(runs[0], False), same_of(runs[1], False))
        if unlike or last[0].keys() != last[1].keys():
            raise ValueError(f"its arms are unlike: {unlike or 'other questions'}")
        return runs, last, read_records(folder / ARMS[1] / "controls.jsonl", by="control")


def seeds_on_disk(folder: Path) -> list[int]:
    """The seeds of a round's folder. seed05 is none: it would be the same as seed5."""
    return sorted(int(path.name[4:]) for path in folder.glob("seed*")
                  if path.is_dir() and re.fullmatch("seed(0|[1-9][0-9]{0,17})", path.name))


def read_round(folder: Path, seeds: list[int] | None = None) -> tuple[dict[int, tuple], list[str], list[str]]:
    """The finished seeds (default: of all there are) in a round's folder, checked to be comparable.

    Returns: what read_seed gives, by seed; notes on seeds left out and on what may differ but must be told;
        what is damaged. FileNotFoundError without a finished seed, ValueError where two differ in more.
    """
    found, notes, damaged = {}, [], []
    for seed in seeds_on_disk(folder) if seeds is None else seeds:
        try:
            found[seed] = read_seed(folder / f"seed{seed}")
        except OSError as error:
            notes.append(f"left out, not finished: seed {seed} ({error})")
        except ValueError as error:
            damaged.append(str(error))
    if not found:
        raise FileNotFoundError(f"{folder}: no finished seed ({'; '.join(damaged + notes) or 'no runs'})")
    (first, _), (questions, _), _ = next(iter(found.values()))
    where = {key: first["history"][0][key] for key in ("code", "machine")}
    for seed, (runs, last, _) in found.items():
        unlike = in_words(same_of(first, True), same_of(runs[0], True))
        if unlike or last[0].keys() != questions.keys():
            raise ValueError(f"{folder}: seeds {first['seed']} and {seed} cannot be compared "
                             f"({unlike or 'other questions'}); run both alike, or keep one in --runs DIR")
        for entry in runs[0]["history"] + runs[1]["history"]:
            other = in_words(where, {key: entry[key] for key in where})
            if other:
                notes.append(f"seed {seed} ran on another machine or code: {other}")
    return found, list(dict.fromkeys(notes)), damaged
