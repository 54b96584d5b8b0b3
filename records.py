"""What runs left on the disk, read back and checked: nothing damaged, and nothing unlike, is ever averaged.

A run is runs/<round>/seed<N>/<arm>/ with run.json (settings, data, base, status) and records.jsonl, a line an
example and evaluation: step, id, tokens (of the answer), correct (of them, right under teacher forcing),
loss, exact, f1 and, for people, option, gold and text. A finished prompt_fs has seed_off.jsonl too, the last
evaluation once more without its seed. arm.py writes them, score.py says what they mean.

Shapes: S seeds, 2 arms, K evaluations, n examples, M = 4 metrics.
"""

import json
import math
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np

from rounds import without_fs

ARMS = ("no_fs", "prompt_fs")
METRICS = ("acc", "loss", "EM", "F1")
FIELDS = itemgetter("step", "id", "correct", "tokens", "loss", "exact", "f1")
SAME_EVERYWHERE = ("standin", "settings", "minutes", "base", "data")    # in all seeds and arms of a round
SAME_IN_A_SEED = (*SAME_EVERYWHERE, "device")    # a GPU's arm is in bf16, a CPU's in fp32
AGAIN = "run this arm again with --fresh"


@dataclass(frozen=True)
class Runs:
    """The seeds of one round, arms side by side."""

    name: str
    seeds: list[int]
    ids: list[str]              # of the examples, sorted
    # (seed, arm): steps (K,), scores (K, n, M)
    tables: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]
    run: dict                   # run.json of one arm: what is SAME_EVERYWHERE
    unfinished: list[str]       # arms whose status is not "done"
    seed_off: dict[int, np.ndarray]    # seed: (n, M), of finished prompt_fs arms

    def last(self) -> np.ndarray:
        """Every arm's last evaluation, (S, 2, n, M)."""
        return np.array([[self.tables[seed, arm][1][-1] for arm in ARMS] for seed in self.seeds])

    def accuracies(self) -> np.ndarray:
        """Token accuracies at every evaluation, (S, 2, K, n); the last K where some arms have more."""
        K = min(len(steps) for steps, _ in self.tables.values())
        return np.array([[self.tables[seed, arm][1][-K:, :, 0] for arm in ARMS] for seed in self.seeds])


def read_run(folder: Path) -> dict:
    """An arm's run.json, checked. Raises ValueError or FileNotFoundError naming the file."""
    path = folder / "run.json"
    round_name, seed, arm = folder.parent.parent.name, folder.parent.name, folder.name
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        here = run["round"], f"seed{run['seed']}", run["arm"]
        parts = run["settings"], run["data"], run["base"]
        if not all(isinstance(part, dict) for part in parts) or "status" not in run:
            raise KeyError("settings, data, base, status")
    except FileNotFoundError:
        command = f"python train.py --round {round_name} --seed {seed.removeprefix('seed')}"
        raise FileNotFoundError(f"{folder}: this arm is missing; run {command}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); {AGAIN}") from error
    if here != (round_name, seed, arm):
        raise ValueError(f"{path}: describes {' '.join(map(str, here))}; put the folder back in its place")
    return run


def read_records(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """records.jsonl -> sorted ids (n,), steps (K,), scores (K, n, M). Errors name file and line."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing, nothing was scored yet; run train.py to the end") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; {AGAIN}") from error
    try:
        # one call of json for the whole file is several times faster than one a line
        rows = [FIELDS(record) for record in json.loads(f"[{','.join(lines)}]")]
        steps, ids, *numbers = zip(*rows)
        values = np.array(numbers, dtype=float)    # (5, K n)
        well_formed = len(rows) == len(lines) and {*map(type, steps)} == {int} and {*map(type, ids)} == {str}
        well_formed &= {*map(type, chain(*numbers))} <= {int, float}    # numpy would read "1" as a number
    except (ValueError, TypeError, KeyError):
        well_formed = False
    if not well_formed:
        bad_line = next((number for number, line in enumerate(lines, 1) if not is_record(line)), 1)
        raise ValueError(f"{path}, line {bad_line}: not an evaluation record; {AGAIN}")
    correct, tokens, loss, exact, f1 = values
    possible = np.isfinite(values).all(axis=0) & (tokens >= 1) & (correct >= 0) & (correct <= tokens)
    possible &= (loss >= 0) & np.isin(exact, (0, 1)) & (f1 >= 0) & (f1 <= 1)
    if not possible.all():
        raise ValueError(f"{path}, line {1 + possible.argmin()}: has a value that cannot be; {AGAIN}")

    steps, step_of = np.unique(steps, return_inverse=True)
    names = sorted(set(ids))
    place = {name: index for index, name in enumerate(names)}
    scores = np.full((len(steps), len(names), len(METRICS)), np.nan)
    scores[step_of, [place[name] for name in ids]] = np.array([correct / tokens, loss, exact, f1]).T
    if len(rows) != len(steps) * len(names) or np.isnan(scores).any():
        raise ValueError(f"{path}: an evaluation lacks examples, or has some twice; {AGAIN}")
    return names, steps, scores


def is_record(line: str) -> bool:
    try:
        step, name, *numbers = FIELDS(json.loads(line))
        return type(step) is int and type(name) is str and all(math.isfinite(number) for number in numbers)
    except (ValueError, TypeError, KeyError):
        return False


def same_everywhere(run: dict) -> dict:
    """What must not differ between the seeds of a round. A seed of the stand-in has its own base and training
    questions, which only its two arms share.
    """
    same = {key: run.get(key) for key in SAME_EVERYWHERE}
    if run.get("standin"):
        same |= {"base": None, "data": {"validation": run["data"].get("validation")}}
    return same


def differences(a, b, name: str = ""):
    """Every place where two nested dicts differ: its name, as in settings.lr, and the two values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b


def difference(a: dict, b: dict) -> str | None:
    """The first of them, as `settings.lr is 1e-05 and 3e-05`, or None."""
    return next((f"{name} is {first} and {second}" for name, first, second in differences(a, b)), None)


def seeds_on_disk(name: str, runs_dir: str | Path, finished: bool = False) -> list[int]:
    """The seeds of a round that have a folder; with `finished`, those whose two arms are both done."""
    seeds = []
    for folder in (Path(runs_dir) / name).glob("seed*"):
        if folder.name[4:].isdecimal() and folder.is_dir():
            arms = [folder / arm for arm in ARMS if (folder / arm / "run.json").exists()]
            if not finished or len(arms) == 2 and all(read_run(arm)["status"] == "done" for arm in arms):
                seeds.append(int(folder.name[4:]))
    return sorted(seeds)


def read_round(name: str, runs_dir: str | Path = "runs", seeds: list[int] | None = None) -> Runs:
    """All that the seeds of a round (default: all there are) left on the disk, checked to be comparable.

    Raises: ValueError or OSError, one line: no runs, an arm missing, damaged files, other settings, base or
    data in one arm or seed than in another, other examples, arms of a seed that were stopped at different
    steps.
    """
    folder = Path(runs_dir) / name
    seeds = seeds_on_disk(name, runs_dir) if seeds is None else list(dict.fromkeys(seeds))
    if not seeds:
        raise FileNotFoundError(f"{folder}: no runs; run python train.py --round {name}, or name --runs DIR")
    tables, unfinished, seed_off, first, no_fs = {}, [], {}, None, {}
    for place in [folder / f"seed{seed}" / arm for seed in seeds for arm in ARMS]:
        run = read_run(place)
        ids, steps, scores = read_records(place / "records.jsonl")
        if first is None:
            first, first_run, first_ids = place, run, ids
        other, unlike = first, difference(same_everywhere(first_run), same_everywhere(run))
        if unlike is None and run["arm"] == ARMS[1]:
            other = place.with_name(ARMS[0])
            unlike = difference({key: no_fs.get(key) for key in SAME_IN_A_SEED},
                                {key: run.get(key) for key in SAME_IN_A_SEED})
        if unlike is None and ids != first_ids:
            other, unlike = first, "they were scored on different examples"
        if unlike:
            raise ValueError(f"{other} and {place} cannot be compared: {unlike}; run both alike, or keep "
                             "them apart with --runs DIR")
        no_fs = run
        if run["status"] != "done":
            unfinished.append(f"seed {run['seed']} {run['arm']} (at step {steps[-1]})")
        tables[run["seed"], run["arm"]] = steps, scores
        if (place / "seed_off.jsonl").exists() and run["arm"] == ARMS[1] and run["status"] == "done":
            seed_off[run["seed"]] = read_records(place / "seed_off.jsonl")[2][-1]
    for seed in seeds:
        without, with_fs = (int(tables[seed, arm][0][-1]) for arm in ARMS)
        # a budget in minutes, and only that, gives the two arms unequal steps
        if without != with_fs and first_run.get("minutes") is None:
            raise ValueError(f"{folder}/seed{seed}: no_fs was last scored at step {without}, prompt_fs at "
                             f"step {with_fs}; run python train.py --round {name} --seed {seed} to the end")
    if len(first_ids) < 2:
        raise ValueError(f"{folder}: scored on a single example; statistics need two at least, see n_val")
    return Runs(name, list(seeds), first_ids, tables, first_run, unfinished, seed_off)


def check_comparable(a: Runs, b: Runs) -> None:
    """Raises ValueError where more than Future-Seed sets two rounds apart."""
    first, second = (same_everywhere(runs.run) | {"settings": without_fs(runs.run["settings"])}
                     for runs in (a, b))
    reason = difference(first, second)
    if reason is None and a.ids != b.ids:
        reason = "they were scored on different examples"
    if reason is None and not {*a.seeds} & {*b.seeds}:
        reason = "they have no seed in common"
    if reason:
        raise ValueError(f"{a.name} and {b.name} cannot be compared: {reason}")
