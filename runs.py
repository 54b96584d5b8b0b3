"""Runs: what a run is, when two runs may be compared, and how runs are read back from the disk.

A run is one arm of one seed of a round, in a folder such as runs/S20/seed1/prompt_fs. Its run.json says what
it is (round, seed, arm, settings, base, data), where it ran (code, machine) and how far it is. Nothing that
is damaged, unfinished or of another kind is ever averaged: every file is checked here when it is read.

A run's questions come from one of three sources, and each source has a folder of its own:

    real      runs/S20             the publishers' records
    own       runs/own/S20         a user's own questions, from --data DIR
    standin   runs/standin/S20     the built-in stand-in's made-up questions
"""

import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, NamedTuple

from files import read_lines, read_text, say, write_json
from model import read_pt
from rounds import Round, checked

ARMS = ("no_fs", "prompt_fs")
METRICS = ("acc", "loss", "EM", "F1")    # eval.py says what they are
# prompt_fs, once trained, is scored again with its seed states taken away, or made from a wrong prompt
CONTROLS = {"off": "switched off", "other": "made from another prompt",
            "shuffled": "made from its own prompt, end shuffled"}
FOLDERS = {"real": "", "own": "own", "standin": "standin"}
NO_MEMORY = "DefaultCPUAllocator"        # in a RuntimeError: torch has no class for memory that a CPU lacks

# the types of what stands in a run's files; a tuple is a choice, a dict or list goes on inside
SURROUNDINGS = {"from_step": int, "code": str, "machine": dict}
IDENTITY = {
    "round": str, "seed": int, "arm": str, "source": str, "settings": dict, "minutes": (float, None),
    "base": {"name": str, "sha256": (str, None)},
    "data": {"train": str, "validation": str, "questions_cut": int},
}
RUN = IDENTITY | {"status": str, "steps": int, "seconds": int, "history": [SURROUNDINGS]}
RECORD = {"id": str, "loss": float, "tokens": int, "correct": int, "exact": int, "f1": float}
# a checkpoint holds these, and the state dicts of model, fs and optimizer
CHECKPOINT = {"identity": dict, "step": int, "seconds": float, "metrics": [{"step": int}],
              "records": [RECORD | {"step": int}], "history": [SURROUNDINGS]}


class Seed(NamedTuple):
    """Both arms of one seed, finished and alike."""

    runs: dict[str, dict]           # arm -> its run.json
    evaluations: dict[str, dict]    # arm -> example id -> the scores of its last evaluation, by METRICS
    controls: dict[str, dict]       # control -> example id -> the scores of prompt_fs


class Damaged(ValueError):
    """A file does not hold what it should."""


START_OVER = "Run this arm again with --fresh."


@contextlib.contextmanager
def naming_damage(path: Path, remedy: str = START_OVER) -> Iterator[None]:
    """Turn any error raised while `path` is read and parsed into one line naming the file and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, Damaged)) or NO_MEMORY in str(error):
            raise
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())[:120]
        raise Damaged(f"{path} is damaged ({type(error).__name__}: {reason}). {remedy}") from error


def check_shape(value, shape, name: str = "it") -> None:
    """ValueError unless a value from a file has the types that `shape` gives, all the way down."""
    if isinstance(shape, dict):
        check_shape(value, dict, name)
        for key, inner in shape.items():
            if key not in value:
                raise ValueError(f"{name} has no {key!r}")
            check_shape(value[key], inner, key)
    elif isinstance(shape, list):
        check_shape(value, list, name)
        for entry in value:
            check_shape(entry, shape[0], f"an entry of {name}")
    elif isinstance(shape, tuple):
        kind, _ = shape
        if value is not None:
            check_shape(value, kind, name)
    else:
        # Python takes True for an int, and a whole number is a fine float
        fits = type(value) is shape or (shape is float and type(value) is int)
        if not fits:
            raise ValueError(f"{name} is {value!r:.40}, which is not of type {shape.__name__}")


# ---- when two runs are the same, and when they can be compared ---------------------------------------------

def differences(one, other, name: str = "") -> list[tuple]:
    """Where two nested dicts differ, as [("settings.lr", 1e-05, 3e-05), ...]."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in {**one, **other}:
            found += differences(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))
        return found
    return [] if one == other else [(name, one, other)]


def in_words(differences: list[tuple], here: str, there: str) -> str:
    """The first few differences, as "settings.lr is 1e-05 on disk, 3e-05 in this command"."""
    def short(value) -> str:
        return " ".join(str(value).split())[:16]    # a message is one line, whatever a file holds

    texts = [f"{name} is {short(one)} {here}, {short(other)} {there}" for name, one, other in differences]
    if len(texts) > 3:
        texts = texts[:3] + [f"and {len(texts) - 3} more"]
    return "; ".join(texts)


def check_same_run(place: Path, found: dict, wanted: dict) -> None:
    """ValueError unless what was found on the disk is the run that is wanted: all of its identity."""
    unlike = differences({key: found.get(key) for key in wanted}, wanted)
    if unlike:
        raise ValueError(f"{place} already contains a different run: "
                         f"{in_words(unlike, 'on disk', 'in this command')}. Use --fresh to overwrite it, or "
                         "another --runs DIR.")


def comparable_part(run: dict, across_seeds: bool) -> dict:
    """What must be equal in two runs for their scores to be compared."""
    part = {key: run[key] for key in ("source", "settings", "minutes", "base", "data") if key in run}
    if across_seeds and run["source"] == "standin" and "data" in run:
        # there every seed has a base and training questions of its own
        part["base"], part["data"] = None, run["data"]["validation"]
    return part


def check_comparable(folder: Path, identity: dict, arms: list[str], replaced: set[int]) -> None:
    """ValueError if a run that is about to start could not be compared with the runs that are there.

    Args: folder, of the round; identity, of the run, or as much of it as is known so far; arms that are about
    to run; replaced, the seeds whose runs this command deletes first.
    """
    for seed in seeds_on_disk(folder):
        for arm in ARMS:
            own = seed == identity["seed"] and arm in arms
            place = folder / f"seed{seed}" / arm
            if own or (seed in replaced and arm in arms) or not (place / "run.json").exists():
                continue
            try:
                there = read_run(place)
            except ValueError:
                continue    # the report tells of damage, and leaves the seed out
            across = seed != identity["seed"]
            known = comparable_part(identity, across)
            found = comparable_part(there, across)
            unlike = differences({key: found[key] for key in known}, known)
            if unlike:
                raise ValueError(f"seed {identity['seed']} could not be compared with {place}: "
                                 f"{in_words(unlike, 'there', 'in this command')}. Run both alike, or pass "
                                 "another --runs DIR.")


# ---- one run, read back ------------------------------------------------------------------------------------

def read_run(folder: Path) -> dict:
    """A run's run.json, checked. ValueError names the file; FileNotFoundError where there is none."""
    with naming_damage(folder / "run.json"):
        run = json.loads(read_text(folder / "run.json"))
        check_shape(run, RUN)
        belongs = Path(run["round"], f"seed{run['seed']}", run["arm"])
        if belongs.parts != folder.absolute().parts[-3:]:
            raise ValueError(f"it belongs to {belongs}")
        if run["source"] not in FOLDERS or run["status"] not in ("running", "done"):
            raise ValueError(f"source {run['source']!r}, status {run['status']!r}")
        minutes = run["minutes"]
        if minutes is not None and not 0 < minutes < 1e9:    # NaN is not equal to itself
            raise ValueError(f"minutes is {minutes}")
        if not 0 <= run["steps"] < 10**9 or not run["history"] or run["data"]["questions_cut"] < 0:
            raise ValueError("steps, history or questions_cut has a value that cannot be")
        recipe_of(run)
    return run


def recipe_of(run: dict) -> Round:
    """The recipe that a run was made by, from its own settings. ValueError if they are none."""
    settings = {key: checked(key, value, "settings") for key, value in run["settings"].items()}
    try:
        recipe = Round(name=run["round"], title="", **settings)
    except TypeError as error:    # a setting is missing
        raise ValueError(f"its settings are of another version of this code: {error}") from None
    if recipe.settings().keys() != settings.keys():
        raise ValueError("its settings are of another version of this code")
    return recipe


def status_of(folder: Path, identity: dict) -> str:
    """A run's status: absent, running or done. ValueError where the folder contains a different run."""
    if not (folder / "run.json").exists():
        return "absent"
    run = read_run(folder)
    check_same_run(folder, run, identity)
    return run["status"]


def read_records(path: Path, by: str = "step") -> dict:
    """records.jsonl as {step: {example id: scores by METRICS}}; controls.jsonl likewise, by "control".

    ValueError names the file where it is missing, where a value cannot be, where an example is there twice,
    or where an evaluation lacks one.
    """
    if not path.exists():
        raise Damaged(f"{path} is missing. {START_OVER}")
    evaluations = {}
    with naming_damage(path):
        for number, line in read_lines(path):
            record = json.loads(line)
            check_shape(record, RECORD | {by: int if by == "step" else str}, f"line {number}")
            in_range = (0 <= record["correct"] <= record["tokens"] < 10**6 and 0 <= record["loss"] < 1e30
                        and record["exact"] in (0, 1) and 0 <= record["f1"] <= 1 and record["tokens"] > 0)
            evaluation = evaluations.setdefault(record[by], {})
            if not in_range or record["id"] in evaluation:
                raise ValueError(f"line {number} has a value that cannot be, or an example again")
            evaluation[record["id"]] = {"acc": record["correct"] / record["tokens"], "loss": record["loss"],
                                        "EM": record["exact"], "F1": record["f1"]}
        if len({frozenset(evaluation) for evaluation in evaluations.values()}) != 1:
            raise ValueError("an evaluation lacks examples")
    return evaluations


def read_seed(folder: Path) -> Seed:
    """Both arms of a seed. OSError where an arm is not finished, ValueError where it is damaged or unlike."""
    runs = {arm: read_run(folder / arm) for arm in ARMS}
    for arm, run in runs.items():
        if run["status"] != "done":
            raise OSError(f"{folder / arm} stands at step {run['steps']}")
    evaluations = {}
    for arm, run in runs.items():
        path = folder / arm / "records.jsonl"
        by_step = read_records(path)
        if run["steps"] not in by_step:
            raise Damaged(f"{path} holds no evaluation at step {run['steps']}. {START_OVER}")
        evaluations[arm] = by_step[run["steps"]]
    unlike = differences(*(comparable_part(runs[arm], across_seeds=False) for arm in ARMS))
    if unlike:
        what = in_words(unlike, "in no_fs", "in prompt_fs")
        raise Damaged(f"{folder}: its arms cannot be compared: {what}. Run both alike, with --fresh.")
    path = folder / "prompt_fs" / "controls.jsonl"
    controls = read_records(path, by="control")
    if controls.keys() != CONTROLS.keys():
        raise Damaged(f"{path} should hold the controls {', '.join(CONTROLS)}. {START_OVER}")
    questions = [part.keys() for part in (*evaluations.values(), *controls.values())]
    if any(ids != questions[0] for ids in questions) or len(questions[0]) < 2:
        raise Damaged(f"{folder}: its arms were scored on different questions, or on one alone. Run both "
                      "again, with --fresh.")
    return Seed(runs, evaluations, controls)


def read_checkpoint(path: Path, identity: dict, ids: list[str]) -> dict:
    """A run's checkpoint.pt, checked; its tensors are for the caller to fit to a model.

    Args: identity, of the run; ids, of its validation examples, in their order.
    Raises: ValueError where it is damaged or another run's, or where its step, its losses and its records do
        not belong together.
    """
    with naming_damage(path):
        saved, _ = read_pt(path)
        check_shape(saved, CHECKPOINT, "the checkpoint")
    check_same_run(path, saved["identity"], identity)
    with naming_damage(path):
        losses = [line for line in saved["metrics"] if "train_loss" in line]
        check_shape(losses, [{"train_loss": float}], "metrics")
        trained = [line["step"] for line in losses]
        evaluated = [line["step"] for line in saved["metrics"] if "train_loss" not in line]
        due = list(range(0, len(trained), identity["settings"]["eval_every"]))
        scored = [(step, id) for step in evaluated for id in ids]
        if (trained != list(range(1, len(trained) + 1)) or len(trained) != saved["step"]
                or evaluated not in (due, due + [saved["step"]])    # the last one is made after a save
                or [(line["step"], line["id"]) for line in saved["records"]] != scored):
            raise ValueError("its step, its losses and its records do not belong together")
        if not saved["history"] or not 0 <= saved["seconds"] < 1e12:
            raise ValueError("history or seconds has a value that cannot be")
    return saved


def copy_identical_no_fs(folder: Path, identity: dict, surroundings: dict) -> bool:
    """Copy an identical finished no_fs run from another round, as R8 has R6's. True if there was one.

    Without Future-Seed its settings decide nothing. A budget in minutes depends on the clock, and a run that
    was resumed elsewhere on two machines: neither is identical to anything.
    """
    if identity["arm"] != "no_fs" or identity["minutes"] is not None or folder.exists():
        return False    # the last: a run of this round has begun, and goes on

    def decisive(run: dict) -> dict:
        settings = {key: value for key, value in run["settings"].items()
                    if not key.startswith(("fs_", "alpha_"))}
        return {key: run[key] for key in IDENTITY} | {"round": None, "settings": settings}

    round_folder, seed_name = folder.parents[1], folder.parent.name
    for path in sorted(round_folder.parent.glob(f"*/{seed_name}/no_fs")):
        try:
            run = read_run(path)
            whole = (run["status"] == "done" and run["steps"] in read_records(path / "records.jsonl")
                     and (path / "model.pth").exists())
        except (ValueError, OSError):
            continue    # damaged, or being deleted: the round that it belongs to tells of it
        here = [{"from_step": 0, **surroundings}]
        if whole and run["history"] == here and not differences(decisive(run), decisive(identity)):
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".copy-"), "no_fs")
            try:
                shutil.copytree(path, temporary)
                copied = run | identity | {"copied_from": run["round"]}
                write_json(temporary / "run.json", [copied], indent=1)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary.parent)
            say(f"{folder}: copied from {path}, which is the same run")
            return True
    return False


# ---- a round's runs, read back -----------------------------------------------------------------------------

def seeds_on_disk(folder: Path) -> list[int]:
    """The seeds of a round's folder. seed05 is none: it would be the same as seed5."""
    return sorted(int(path.name[4:]) for path in folder.glob("seed*")
                  if path.is_dir() and re.fullmatch("seed(0|[1-9][0-9]{0,17})", path.name))


def read_round(folder: Path, seeds: list[int] | None = None) -> tuple[dict[int, Seed], list[str], list[str]]:
    """The finished seeds (default: all there are) in a round's folder, checked to be comparable.

    Returns: Seed by number; notes on seeds left out and on what may differ but must be told; what is damaged.
        FileNotFoundError without a finished seed, ValueError where two seeds cannot be compared.
    """
    found, notes, damaged = {}, [], []
    for seed in seeds_on_disk(folder) if seeds is None else seeds:
        try:
            found[seed] = read_seed(folder / f"seed{seed}")
        except OSError as error:
            notes.append(f"seed {seed} is left out, because it is not finished ({error})")
        except ValueError as error:
            damaged.append(str(error))
    if not found:
        reasons = "; ".join(damaged + notes) or "no runs"
        raise FileNotFoundError(f"{folder} has no finished seed: {reasons}")
    first, reference = next(iter(found.items()))
    questions = reference.evaluations["no_fs"].keys()
    where = reference.runs["no_fs"]["history"][0]
    for seed, both in found.items():
        unlike = differences(*(comparable_part(one.runs["no_fs"], across_seeds=True)
                               for one in (reference, both)))
        if not unlike and both.evaluations["no_fs"].keys() != questions:
            unlike = [("questions", "some", "others")]
        if unlike:
            what = in_words(unlike, f"in seed {first}", f"in seed {seed}")
            raise ValueError(f"{folder}: seeds {first} and {seed} cannot be compared: {what}. Run both "
                             "alike, or keep one of them in another --runs DIR.")
        for arm in ARMS:
            for entry in both.runs[arm]["history"]:
                moved = differences({key: where[key] for key in ("code", "machine")},
                                    {key: entry[key] for key in ("code", "machine")})
                if moved:
                    notes.append(f"seed {seed} ran on another machine or code than seed {first}: "
                                 f"{in_words(moved, 'there', 'here')}")
    return found, list(dict.fromkeys(notes)), damaged
