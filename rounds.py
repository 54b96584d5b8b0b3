"""What a round is: one recipe, run without and with Future-Seed, as written in rounds.toml.

A round is a flat set of typed settings, and `--set key=value` changes any of them. Its Future-Seed settings
have the names of the experiment log, whose rounds R2 to R10 these are: a line of the log can be pasted after
`--set`. What the log measured for a round stands in `Round.log`.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROUNDS_FILE = Path(__file__).resolve().with_name("rounds.toml")
CHOICES = {
    "task": ("arc", "hotpotqa"),
    "order": ("context_first", "question_first", "both_ends", "twice"),
    "fs_alpha_schedule": ("none", "linear", "cosine"),
    "fs_gate": ("scalar", "head", "heads", "input"),
}
LEAST = {"n_val": 2, "max_prompt": 1, "max_answer": 1, "n_train": 1, "batch_size": 1, "eval_every": 1}


@dataclass(frozen=True)
class Round:
    """One recipe. Lengths are in tokens. A setting without a comment is what its name says."""

    name: str
    title: str
    task: str                  # "arc" or "hotpotqa"
    order: str                 # of question and context (ARC: options) in the prompt, see data.arrange
    seeds: tuple[int, ...] = (0, 1, 2)    # the log's; a run's seed draws its batches
    registered: tuple[int, ...] = ()
    inherits: str | None = None
    end_mark: bool = False
    arc_border: str = "log"
    primary: bool = False      # the one comparison of the study that was registered as its question
    base: str = "rwkv7-g1d-0.1b-20260129-ctx8192.pth"
    max_prompt: int = 512      # longer prompts keep their last tokens
    min_prompt: int = 0        # shorter prompts are left out
    max_answer: int = 8        # longer answers keep their first tokens
    n_train: int = 1000
    n_val: int = 200           # all of them are scored at every evaluation
    data_seed: int = 0         # draws the training questions
    validation_seed: int = 1234

    batch_size: int = 8
    micro_batch_size: int = 0  # rows at once, the gradient summed over pieces; 0 for the whole batch
    checkpoint_activations: bool = False    # recompute blocks in the backward: less memory, more time
    steps: int = 1000
    eval_every: int = 250
    lr: float = 3e-5
    weight_decay: float = 0.01    # on the matrices
    beta2: float = 0.999       # of AdamW
    grad_clip: float = 0.0     # bound on the gradient's norm; 0 for none
    warm_up: int = 0           # steps over which lr rises from 0

    # Future-Seed, under the log's own names; fs.FutureSeed says what they do
    alpha_init: float = -2.0
    alpha_lr: float = 0.0      # 0: alpha stays as it starts
    fs_layer_start: int = 6
    fs_norm: bool = True
    fs_detach: bool = True
    fs_clip: float = 1.0
    fs_scale: float = 1.0
    fs_alpha_schedule: str = "none"
    fs_alpha_min: float = 1.0
    fs_alpha_max: float = 1.0
    fs_gate: str = "scalar"
    fs_gate_lr: float = 1e-3   # of the input gate's weights

    # the stand-in: its questions hold `facts` facts, 0 for real records. Training starts with facts_first of
    # them for facts_hold steps and has them all facts_ramp steps later; a share `rehearsal` of its batches
    # puts the question first, or the base forgets how to answer what it could; channels, of its base
    facts: int = 0
    facts_first: int = 2
    facts_hold: int = 20
    facts_ramp: int = 180
    rehearsal: float = 0.25
    channels: int = 48
    log: dict | None = None    # d_acc: prompt_fs minus no_fs by seed, their mean, std (population) and status

    def settings(self) -> dict:
        """All that decides a run but its seed, as plain JSON values."""
        return {key: getattr(self, key) for key in SETTINGS if key not in ("title", "seeds", "primary", "registered", "inherits")}

    def fs_settings(self) -> dict:
        """The keyword arguments of fs.FutureSeed."""
        return {
            "alpha": self.alpha_init, "train_alpha": self.alpha_lr > 0, "gate": self.fs_gate,
            "layer_start": self.fs_layer_start, "norm": self.fs_norm, "detach": self.fs_detach,
            "clip": self.fs_clip, "scale": self.fs_scale, "schedule": self.fs_alpha_schedule,
            "schedule_min": self.fs_alpha_min, "schedule_max": self.fs_alpha_max,
        }


# name -> type, of all that rounds.toml and --set may hold
SETTINGS = {name: kind for name, kind in Round.__annotations__.items() if name not in ("name", "log", "inherits", "registered")}


def checked(key: str, value, where: str):
    """A setting's value, of its type; ValueError in one line where it is none, or no setting."""
    if key not in SETTINGS:
        raise ValueError(f"{where}: no setting is called {key!r}; the settings are {', '.join(SETTINGS)}")
    kind = SETTINGS[key]
    if kind is float and type(value) in (int, float) and abs(value) < 1e38:    # what fp32 can hold, no NaN
        return float(value)
    if key == "seeds" and type(value) is list and all(type(seed) is int for seed in value):
        return tuple(value)
    if kind is float or type(value) is not kind:
        raise ValueError(f"{where}: {key} must be {kind.__name__}, not {value!r:.80}")
    if key in CHOICES and value not in CHOICES[key]:
        raise ValueError(f"{where}: {key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
    if kind is int and value < LEAST.get(key, 0):
        raise ValueError(f"{where}: {key} must be {LEAST.get(key, 0)} or more, not {value}")
    return value


def load_rounds(path: str | Path = ROUNDS_FILE) -> tuple[dict[str, Round], dict[str, Round]]:
    """Every round of a rounds file by name, as it runs on real records and as it runs on the stand-in.

    A round that `inherits` starts from the settings of a round above it; `log` and `primary` are its own. On
    the stand-in the settings of [standin] and [standin.TASK] are laid over it. ValueError for a wrong file.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    standin = tables.pop("standin", {})
    rounds, miniatures = {}, {}
    for name, table in tables.items():
        where = f"{path}, [{name}]"
        try:
            parent, log = table.pop("inherits", None), table.pop("log", None)
            own = {"name": name, "log": log, "primary": False}
            own |= {key: checked(key, value, where) for key, value in table.items()}
            rounds[name] = dataclasses.replace(rounds[parent], **own) if parent else Round(**own)
        except KeyError:
            raise ValueError(f"{where}: inherits = {parent!r}: no round above has this name") from None
        except (TypeError, AttributeError) as error:    # a setting is missing, or this is no table
            raise ValueError(f"{where}: {error}") from error
        overlay = {**standin, **standin.get(rounds[name].task, {})}
        small = {key: checked(key, value, f"{path}, [standin]") for key, value in overlay.items()
                 if key not in CHOICES["task"]}
        miniatures[name] = dataclasses.replace(rounds[name], **small)
    return rounds, miniatures


def expand(names: list[str], rounds: dict[str, Round]) -> list[str]:
    """Names as they are in rounds.toml, from names as people write them: r8 is R8, and R9 is R9a and R9b."""
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
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + 10_000:
            raise ValueError(f"--seeds {text}: write seeds as 0-9 or 0,3,5")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def with_settings(recipe: Round, pairs: list[str]) -> Round:
    """The round with `key=value` pairs of the command line. Values are TOML, or plain words for strings."""
    changes = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text if equals else None
        changes[key] = checked(key, value, f"--set {pair}")
    return dataclasses.replace(recipe, **changes)

def setting_lines(): return []
