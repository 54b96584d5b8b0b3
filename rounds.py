"""What a round is: one recipe, run with and without Future-Seed, as written in rounds.toml.

A round is a flat set of typed settings; `--set key=value` on the command line changes any of them. The
settings under [standin] are laid over a round that runs on the built-in stand-in. Reference: the experiment
log, whose rounds R2 to R10 these are; what it measured for a round stands in `Round.log`.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROUNDS_FILE = Path(__file__).resolve().parent / "rounds.toml"
NOT_ROUNDS = ("defaults", "standin")    # tables of rounds.toml that other rounds are made with

CHOICES = {
    "task": ("arc", "hotpotqa"),
    "order": ("context_first", "question_first"),
    "fs_schedule": ("none", "linear", "cosine"),
    "fs_gate": ("scalar", "head", "input"),
}
AT_LEAST = {
    "max_prompt": 1, "min_prompt": 0, "max_answer": 1, "n_train": 1, "n_val": 1, "batch_size": 1,
    "micro_batch_size": 0, "steps": 0, "eval_every": 1, "lr": 0, "weight_decay": 0,
    "fs_alpha_lr": 0, "fs_gate_lr": 0, "fs_layer_start": 0, "fs_clip": 0,
    "beta2": 0, "grad_clip": 0, "warm_up": 0, "facts": 0, "facts_first": 2, "facts_hold": 0,
    "facts_ramp": 0, "rehearsal": 0,
}
AT_MOST = {"beta2": 0.99999, "facts": 24, "rehearsal": 1}


@dataclass(frozen=True)
class Log:
    """What the experiment log reported for a round; d_acc are the seeds' differences,
    prompt_fs minus no_fs.
    """

    script: str
    summary: str
    d_acc: tuple[float, ...]
    mean: float
    std: float      # population standard deviation, as the log's
    d_loss: float
    status: str


@dataclass(frozen=True)
class Round:
    """One recipe. Lengths in tokens; the fs_ settings are those of fs.FutureSeed."""

    name: str
    title: str
    base: str                  # file name of the official checkpoint to post-train
    seeds: tuple[int, ...]     # the log's seeds; a run's seed draws its batches
    task: str                  # "arc" or "hotpotqa"
    order: str                 # "context_first" (options first, question after) or "question_first"
    max_prompt: int            # longer prompts keep their last tokens
    min_prompt: int            # shorter prompts are skipped
    max_answer: int            # longer answers keep their first tokens
    n_train: int
    n_val: int
    data_seed: int
    validation_seed: int
    batch_size: int
    # rows at once in one process, the gradient summed over pieces; 0 for the whole batch
    micro_batch_size: int
    # recompute blocks in the backward: a fraction of the memory for more time
    checkpoint_activations: bool
    steps: int
    eval_every: int            # steps between evaluations, each on the whole validation set
    lr: float
    weight_decay: float
    beta2: float               # of AdamW
    grad_clip: float           # bound on the gradient's norm; 0 for none
    warm_up: int               # steps over which lr rises from 0
    # of the stand-in: facts to choose from in a question, 0 on real records; training starts with facts_first
    # of them, for facts_hold steps, and has them all facts_ramp steps later; rehearsal is the share of
    # batches that put the question first, as pretraining did
    facts: int
    facts_first: int
    facts_hold: int
    facts_ramp: int
    rehearsal: float
    fs_alpha: float
    fs_alpha_lr: float         # 0 keeps alpha as it starts
    fs_layer_start: int
    fs_norm: bool
    fs_detach: bool
    fs_clip: float
    fs_scale: float
    fs_schedule: str
    fs_schedule_min: float
    fs_schedule_max: float
    fs_gate: str
    fs_gate_lr: float
    log: Log | None = None

    def settings(self) -> dict:
        """All that decides a run but its seed, as plain JSON values."""
        values = dataclasses.asdict(self)
        for key in ("log", "seeds", "title"):
            del values[key]
        return values

    def fs_settings(self) -> dict:
        """The keyword arguments of fs.FutureSeed."""
        names = ("alpha", "layer_start", "norm", "detach", "clip", "scale", "schedule", "schedule_min",
                 "schedule_max", "gate")
        return {name: getattr(self, f"fs_{name}") for name in names} | {"train_alpha": self.fs_alpha_lr > 0}


def without_fs(settings: dict) -> dict:
    """What a round's settings are to an arm without Future-Seed, whatever the round is called."""
    return {key: value for key, value in settings.items() if key != "name" and not key.startswith("fs_")}


SETTINGS = {
    field.name: field.type for field in dataclasses.fields(Round) if field.name not in ("name", "log")
}


def checked(key: str, value, kind: type, where: str):
    """`value` as the type of the setting `key`;
    ValueError with one line that says what is wrong and where.
    """
    if kind in (tuple[int, ...], tuple[float, ...]):
        item = kind.__args__[0]
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{where}: {key} must be a list of numbers, not {value!r}")
        return tuple(checked(key, number, item, where) for number in value)
    # the integers that a float holds exactly
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: {key} must be of type {kind.__name__}, not {value!r}")
    if kind is float and not abs(value) < 1e38:
        raise ValueError(f"{where}: {key} must be a finite number that fp32 can hold, not {value!r}")
    if key in CHOICES and value not in CHOICES[key]:
        raise ValueError(f"{where}: {key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
    if key in AT_LEAST and value < AT_LEAST[key]:
        raise ValueError(f"{where}: {key} must be {AT_LEAST[key]} or more, not {value}")
    if key in AT_MOST and value > AT_MOST[key]:
        raise ValueError(f"{where}: {key} must be {AT_MOST[key]} or less, not {value}")
    return value


def setting(key: str, value, where: str):
    """`checked`, for a key that may be wrong too."""
    if key not in SETTINGS:
        raise ValueError(f"{where}: no setting is called {key!r}; the settings are {', '.join(SETTINGS)}")
    return checked(key, value, SETTINGS[key], where)


def resolve(name: str, tables: dict, where: str, below: tuple[str, ...] = ()) -> dict:
    """The settings of a round with all that it inherits, nearest first."""
    if not isinstance(name, str):
        raise ValueError(f"{where}: [{below[-1]}] inherits from {name!r}, which is not the name of a round")
    if name in below:
        raise ValueError(f"{where}: {' inherits from '.join((*below, name))}, a circle")
    if name not in tables or name in NOT_ROUNDS or "parts" in tables[name]:
        raise ValueError(f"{where}: [{below[-1]}] inherits from {name!r}, which is not a round")
    own = {key: value for key, value in tables[name].items() if key not in ("inherits", "log")}
    parent = tables[name].get("inherits")
    inherited = (tables.get("defaults", {}) if parent is None
                 else resolve(parent, tables, where, (*below, name)))
    return {**inherited, **own}


def read_rounds(path: str | Path) -> dict:
    """The raw tables of a rounds file. Raises OSError, or ValueError naming the file."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} = {table!r} stands outside of a round; put it under [defaults]")
    return tables


def miniature(round: Round, path: str | Path = ROUNDS_FILE) -> Round:
    """The round as it runs on the stand-in: its task, order and Future-Seed, [standin]'s everything else.

    Raises ValueError, one line, for an unknown key or a wrong type.
    """
    table = read_rounds(path).get("standin", {})
    values = {key: value for key, value in table.items() if not isinstance(value, dict)}
    values |= table.get(round.task, {})
    where = f"{path}, [standin]"
    return dataclasses.replace(round, **{key: setting(key, value, where) for key, value in values.items()})


def load_rounds(path: str | Path = ROUNDS_FILE) -> dict[str, Round]:
    """Every round of a rounds file by name.
    Raises ValueError, one line, for an unknown key or a wrong type.
    """
    tables = read_rounds(path)
    rounds = {}
    for name, table in tables.items():
        where = f"{path}, [{name}]"
        if "parts" in table:
            check_parts(table, tables, where)
        if name in NOT_ROUNDS or "parts" in table:
            continue
        values = {key: setting(key, value, where) for key, value in resolve(name, tables, where).items()}
        missing = [key for key in SETTINGS if key not in values]
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} not set")
        rounds[name] = Round(name=name, log=read_log(table, where), **values)
    return rounds


def check_parts(table: dict, tables: dict, where: str) -> None:
    """A round of parts holds nothing else, and its parts are rounds."""
    parts = table["parts"]
    names = [name for name in tables if name not in NOT_ROUNDS and "parts" not in tables[name]]
    if len(table) > 1 or not isinstance(parts, list) or not parts or any(part not in names for part in parts):
        raise ValueError(f"{where}: parts must be a list of rounds of this file and stand alone, not {table}")


def read_log(table: dict, where: str) -> Log | None:
    if "log" not in table:
        return None
    fields = {field.name: field.type for field in dataclasses.fields(Log)}
    if not isinstance(table["log"], dict) or set(table["log"]) != set(fields):
        raise ValueError(f"{where}: log must hold {', '.join(fields)}, no more and no less")
    return Log(**{key: checked(key, value, fields[key], where) for key, value in table["log"].items()})


def expand(names: list[str], path: str | Path = ROUNDS_FILE) -> list[str]:
    """Round names with those that stand for several (R9) replaced by their parts;
    ValueError for an unknown one.
    """
    tables = read_rounds(path)
    rounds = [name for name in tables if name not in NOT_ROUNDS]
    expanded = []
    for name in names:
        if name not in rounds:
            raise ValueError(f"no round is called {name!r}; the rounds are {', '.join(rounds)}")
        expanded += tables[name].get("parts", [name])
    return list(dict.fromkeys(expanded))


def seeds_of(text: str) -> list[int]:
    """Seeds as --seeds takes them, "0-9" or "0,3,5" or both; ValueError for anything else."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"--seeds {text}: write seeds as 0-9 or 0,3,5")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def with_settings(round: Round, pairs: list[str]) -> Round:
    """The round with `key=value` pairs from the command line applied.
    Values are TOML, or plain words for strings.
    """
    changes = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: write key=value")
        try:
            parsed = tomllib.loads(f"value = {text}")
        except (tomllib.TOMLDecodeError, RecursionError):
            parsed = {}
        value = parsed["value"] if list(parsed) == ["value"] else text
        changes[key] = setting(key, value, f"--set {pair}")
    return dataclasses.replace(round, **changes)
