"""What a round is: one recipe, run without and with Future-Seed, as written in rounds.toml.

A round is a flat set of settings. Each is declared once below, with its type, its default, what it means and
what it may be; rounds.toml, `--set key=value` and `train.py --list` all go by that.

"The log" is the Future-Seed post-training experiment log, from which rounds R2 to R10 come. The Future-Seed
settings have its names, so that a line of it can be pasted after `--set`. What it measured for a round stands
in `Round.log`.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROUNDS_FILE = Path(__file__).resolve().with_name("rounds.toml")
ROUND_NAME = "[A-Za-z0-9_-]+"    # it becomes a folder's name
FILE_NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]*"    # without "..", which is a folder
LARGEST_INT = 10**18             # of any whole number; torch takes no seed beyond 2**64
TYPE_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text",
                 list: "a list"}
# a [X.log] table in rounds.toml, which explains the keys
LOG = {"script": str, "summary": str, "d_acc": list, "mean": float, "std": float, "d_loss": float,
       "status": str}


def setting(meaning: str, default=dataclasses.MISSING, **bounds):
    """A field that is a setting.

    Bounds: least and most, the smallest and the largest value; below, a value that is too large already;
    multiple_of; choices, all the values that there are.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, **bounds})


@dataclass(frozen=True)
class Round:
    """One recipe."""

    name: str
    title: str
    task: str = setting("what is asked", choices=("arc", "hotpotqa"))
    order: str = setting("of question and context (ARC: options) in the prompt, see data.arrange",
                         choices=("context_first", "question_first", "both_ends", "twice"))
    base: str = setting("file name of the published base model", "rwkv7-g1d-0.1b-20260129-ctx8192.pth")
    max_prompt: int = setting("tokens; longer prompts keep their last tokens", 512, least=1)
    min_prompt: int = setting("tokens; shorter prompts are left out", 0, least=0)
    max_answer: int = setting("tokens; longer answers keep their first tokens", 8, least=1)
    end_mark: bool = setting("train the line break as an answer's last token", False)
    arc_border: str = setting("ARC: 'Answer: ' and 'A', as in the log, or 'Answer:' and ' A', one token",
                              "log", choices=("log", "token"))
    n_train: int = setting("training questions", 1000, least=1)
    n_val: int = setting("validation questions; all of them are scored at every evaluation", 200, least=2)
    data_seed: int = setting("draws the training questions", 0, least=0)
    validation_seed: int = setting("draws the validation questions", 1234, least=0)

    batch_size: int = setting("questions a step", 8, least=1)
    micro_batch_size: int = setting("rows at once, the gradient summed over pieces; 0: the whole batch", 0,
                                    least=0)
    checkpoint_activations: bool = setting("recompute blocks in the backward: less memory, more time", False)
    steps: int = setting("optimizer steps", 1000, least=0)
    eval_every: int = setting("steps between evaluations", 250, least=1)
    lr: float = setting("learning rate", 3e-5, least=0)
    weight_decay: float = setting("on the matrices", 0.01, least=0)
    beta2: float = setting("of AdamW", 0.999, least=0, below=1)
    grad_clip: float = setting("bound on the gradient's norm; 0: none", 0.0, least=0)
    warm_up: int = setting("steps over which the learning rate rises from 0", 0, least=0)

    alpha_init: float = setting("start of every alpha; the gate is its sigmoid", -2.0)
    alpha_lr: float = setting("learning rate of alpha; 0: alpha stays as it starts", 0.0, least=0)
    fs_layer_start: int = setting("first layer that gets a seed state, counted from 0", 6, least=0)
    fs_norm: bool = setting("scale each head's state to root mean square 1", True)
    fs_detach: bool = setting("no gradient through the seed state", True)
    fs_clip: float = setting("bound on the seed state's entries; 0: none", 1.0, least=0)
    fs_scale: float = setting("constant factor on every gate", 1.0, least=0)
    fs_alpha_schedule: str = setting("of the gate's factor over depth", "none",
                                     choices=("none", "linear", "cosine"))
    fs_alpha_min: float = setting("that factor at the first seeded layer", 1.0, least=0)
    fs_alpha_max: float = setting("that factor at the last layer", 1.0, least=0)
    fs_gate: str = setting("what the gate is made of, see fs.FutureSeed", "scalar",
                           choices=("scalar", "head", "heads", "input"))
    fs_gate_lr: float = setting("learning rate of the input gate's weights", 1e-3, least=0)

    facts: int = setting("stand-in: facts in a question; 0 for real records", 0, least=0, most=32)
    facts_first: int = setting("stand-in: facts at the first steps", 2, least=2, most=32)
    facts_hold: int = setting("stand-in: steps that stay there", 20, least=0)
    facts_ramp: int = setting("stand-in: steps over which facts then grow to all", 180, least=0)
    rehearsal: float = setting("stand-in: share of batches with the question first, or the base forgets how "
                               "to answer what it could", 0.25, least=0, most=1)
    channels: int = setting("stand-in: width of its base", 48, least=16, most=4096, multiple_of=16)

    # what a round says about itself: none of it decides what comes out of a run
    seeds: tuple[int, ...] = (0, 1, 2)       # the seeds that it runs by default; a seed draws the batches
    primary: bool = False                    # the one comparison that the study registered as its question
    registered: tuple[int, ...] = ()         # the seeds on the stand-in that it registered for that
    inherits: str | None = None              # the round that its settings start from
    log: dict | None = None                  # what the experiment log measured, with the keys of LOG

    def settings(self) -> dict:
        """All that decides a run but its seed, as plain JSON values."""
        return {key: getattr(self, key) for key in SETTINGS}

    def fs_settings(self) -> dict:
        """The keyword arguments of fs.FutureSeed."""
        return {
            "alpha": self.alpha_init, "train_alpha": self.alpha_lr > 0, "gate": self.fs_gate,
            "layer_start": self.fs_layer_start, "norm": self.fs_norm, "detach": self.fs_detach,
            "clip": self.fs_clip, "scale": self.fs_scale, "schedule": self.fs_alpha_schedule,
            "schedule_min": self.fs_alpha_min, "schedule_max": self.fs_alpha_max,
        }


SETTINGS = {field.name: field for field in dataclasses.fields(Round) if field.metadata}
NOT_INHERITED = {"primary": False, "registered": (), "log": None}


# ---- values ------------------------------------------------------------------------------------------------

def bounds_of(key: str) -> str:
    """What a setting may be, in words; "" for anything of its type."""
    bounds = SETTINGS[key].metadata
    if "choices" in bounds:
        return "one of " + ", ".join(bounds["choices"])
    if "multiple_of" in bounds:
        return f"a multiple of {bounds['multiple_of']} from {bounds['least']} to {bounds['most']}"
    if "most" in bounds:
        return f"{bounds['least']} to {bounds['most']}"
    if "below" in bounds:
        return f"{bounds['least']} or more, and below {bounds['below']}"
    if "least" in bounds:
        return f"{bounds['least']} or more"
    return ""


def setting_lines() -> list[str]:
    """Every setting on a line: its default, what it means and what it may be."""
    lines = []
    for key, field in SETTINGS.items():
        default = ""
        if field.default is not dataclasses.MISSING:
            default = str(field.default).lower()    # true and false, as TOML writes them
        line = f"{key}={default}".ljust(30) + " " + field.metadata["meaning"]
        if bounds_of(key):
            line += f" ({bounds_of(key)})"
        lines.append(line)
    return lines


def is_number(value) -> bool:
    """Whether a value is a number that fp32 can hold: not NaN, not infinite, and no bool."""
    return type(value) in (int, float) and abs(value) < 1e38


def shown(value) -> str:
    """A wrong value as a message shows it."""
    try:
        return f"{value!r:.80}"
    except ValueError:    # Python does not write out whole numbers of more than 4,300 digits
        return "a number of thousands of digits"


def of_type(kind: type, key: str, value, where: str):
    """The value, which must be of this type, and for a float a number that fp32 can hold; else ValueError."""
    fits = type(value) is kind
    if kind is float:
        fits = is_number(value)
    if not fits:
        raise ValueError(f"{where}: {key} must be {TYPE_IN_WORDS[kind]}, not {shown(value)}")
    return value


def within(bounds, value) -> bool:
    """Whether a value keeps to the bounds of its setting, those that there are."""
    if "choices" in bounds:
        return value in bounds["choices"]
    if "least" in bounds and value < bounds["least"]:
        return False
    if "most" in bounds and value > bounds["most"]:
        return False
    if "below" in bounds and value >= bounds["below"]:
        return False
    if "multiple_of" in bounds and value % bounds["multiple_of"] != 0:
        return False
    return True


def checked(key: str, value, where: str):
    """A setting's value, of its type and within its bounds; ValueError in one line otherwise."""
    if key == "seeds":
        raise ValueError(f"{where}: seeds are not a setting; write --seeds 0-9")
    if key not in SETTINGS:
        raise ValueError(f"{where}: no setting is called {key!r}; the settings are {', '.join(SETTINGS)}")
    kind, bounds = SETTINGS[key].type, SETTINGS[key].metadata
    value = kind(of_type(kind, key, value, where))    # 1 is 1.0 where a float is meant
    if kind is int and value >= LARGEST_INT:
        raise ValueError(f"{where}: {key} must be less than {LARGEST_INT:,}, not {shown(value)}")
    if not within(bounds, value):
        raise ValueError(f"{where}: {key} must be {bounds_of(key)}, not {shown(value)}")
    if key == "base" and not re.fullmatch(FILE_NAME, value):
        raise ValueError(f"{where}: base must be the name of a published file, not {shown(value)}; --base "
                         "takes a path")
    return value


def check_together(recipe: Round, where: str) -> None:
    """ValueError where two settings contradict each other."""
    if recipe.min_prompt > recipe.max_prompt:
        raise ValueError(f"{where}: min_prompt = {recipe.min_prompt} is more than max_prompt = "
                         f"{recipe.max_prompt}, so no prompt would be left")
    if 0 < recipe.facts < recipe.facts_first:
        raise ValueError(f"{where}: facts = {recipe.facts} is less than facts_first = {recipe.facts_first}")


# ---- rounds.toml -------------------------------------------------------------------------------------------

def load_rounds(path: str | Path = ROUNDS_FILE) -> tuple[dict[str, Round], dict[str, Round]]:
    """Every round of a rounds file by name, as it runs on real records and as it runs on the stand-in.

    A round that `inherits` starts from the settings of a round above it; log, primary and registered are its
    own. On the stand-in the settings of [standin] and [standin.TASK] are laid over it. ValueError, in one
    line that names file, round and key, for a wrong file.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    standin = table_of(tables.pop("standin", {}), f"{path}, [standin]")
    overlays = {}    # of a task alone
    for task in SETTINGS["task"].metadata["choices"]:
        where = f"{path}, [standin.{task}]"
        overlays[task] = checked_overlay(table_of(standin.pop(task, {}), where), where)
    overlay = checked_overlay(standin, f"{path}, [standin]")    # of both tasks: what is left of the table
    rounds, on_standin = {}, {}
    for name, table in tables.items():
        if name == "own":
            raise ValueError(f"{path}: no round may be called own; runs/own holds runs on a user's questions")
        if not re.fullmatch(ROUND_NAME, name):
            raise ValueError(f"{path}: a round's name may hold letters, digits, _ and - alone, and not "
                             f"{shown(name)}")
        where = f"{path}, [{name}]"
        rounds[name] = read_round_table(name, table_of(table, where), rounds, where)
        on_standin[name] = dataclasses.replace(rounds[name], **(overlay | overlays[rounds[name].task]))
        check_together(rounds[name], where)
        check_together(on_standin[name], f"{where} on the stand-in")
    return rounds, on_standin


def checked_overlay(table: dict, where: str) -> dict:
    """Settings that are laid over a round on the stand-in, checked."""
    for key in ("task", "order"):
        if key in table:
            raise ValueError(f"{where}: a round keeps its {key} on the stand-in; leave {key} out")
    return {key: checked(key, value, where) for key, value in table.items()}


def table_of(value, where: str) -> dict:
    """A copy of the value, which must be a table; ValueError otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a table, not {shown(value)}")
    return dict(value)


def read_round_table(name: str, table: dict, above: dict[str, Round], where: str) -> Round:
    """One round from its table in the file. Args: above, the rounds that stand above it there."""
    own = {"name": name, **NOT_INHERITED}    # what does not come from the parent
    parent = table.pop("inherits", None)
    if parent is not None and (type(parent) is not str or parent not in above):
        raise ValueError(f"{where}: inherits = {shown(parent)}: no round above has this name")
    for key, value in table.items():
        if key == "log":
            own["log"] = checked_log(value, f"{where}, log")
        elif key in ("seeds", "registered"):
            own[key] = checked_seeds(key, value, where)
        elif key == "title":
            own["title"] = of_type(str, key, value, where)
        elif key == "primary":
            own["primary"] = of_type(bool, key, value, where)
        else:
            own[key] = checked(key, value, where)
    if parent is not None:
        return dataclasses.replace(above[parent], inherits=parent, **own)
    for key in ("title", "task", "order"):
        if key not in own:
            raise ValueError(f"{where}: {key} is missing, and so is inherits")
    return Round(**own)


def checked_seeds(key: str, value, where: str) -> tuple[int, ...]:
    """Seeds as rounds.toml lists them: whole numbers, each once."""
    seeds = of_type(list, key, value, where)
    if not all(type(seed) is int and 0 <= seed < LARGEST_INT for seed in seeds):
        raise ValueError(f"{where}: {key} must be a list of whole numbers from 0 on, not {shown(value)}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: {key} names a seed twice: {shown(value)}")
    if key == "seeds" and not seeds:
        raise ValueError(f"{where}: seeds must name a seed; leave the line out for those of the default")
    return tuple(seeds)


def checked_log(table, where: str) -> dict:
    """What the log measured, checked: every key of LOG, each of its type."""
    table = table_of(table, where)
    for key, kind in LOG.items():
        if key not in table:
            raise ValueError(f"{where}: {key} is missing")
        of_type(kind, key, table[key], where)
    for key in table:
        if key not in LOG:
            raise ValueError(f"{where}: {shown(key)} is not among {', '.join(LOG)}")
    if not table["d_acc"] or not all(is_number(delta) for delta in table["d_acc"]):
        raise ValueError(f"{where}: d_acc must be numbers, one a seed, not {shown(table['d_acc'])}")
    if not re.fullmatch(FILE_NAME, table["summary"]):
        raise ValueError(f"{where}: summary must be a file's name, not {shown(table['summary'])}")
    return table


# ---- the command line --------------------------------------------------------------------------------------

def expand(names: list[str], rounds: dict[str, Round]) -> list[str]:
    """The names in rounds.toml that people's names mean: r8 means R8, and R9 means both R9a and R9b."""
    expanded = []
    for wanted in names:
        found = [name for name in rounds if re.fullmatch(re.escape(wanted) + "[a-z]?", name, re.IGNORECASE)]
        if not found:
            raise ValueError(f"no round is called {wanted!r}; the rounds are {', '.join(rounds)}")
        expanded += found
    return list(dict.fromkeys(expanded))


def seeds_of(text: str) -> list[int]:
    """Seeds as --seeds takes them, "0-9" or "0,3,5" or both; ValueError for anything else."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        if not match:
            raise ValueError(f"--seeds {text}: write seeds as 0-9 or 0,3,5")
        first = last = int(match[1])
        if match[2]:
            last = int(match[2])
        if not first <= last < first + 10_000:
            raise ValueError(f"--seeds {text}: {part.strip()} counts down, or is more than 10,000 seeds")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def with_settings(recipe: Round, pairs: list[str]) -> Round:
    """The round with `key=value` pairs of the command line. Values are TOML, or plain words for strings."""
    changes = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or "\n" in pair:    # a second line would be a second key, which nobody reads
            raise ValueError(f"--set {pair}: write key=value, as in --set steps=20 lr=1e-5")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):    # not TOML, as a word without quotes is not
            value = text
        changes[key] = checked(key, value, f"--set {pair}")
    return dataclasses.replace(recipe, **changes)
