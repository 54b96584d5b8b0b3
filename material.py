"""What the two arms of a seed are made from: questions to train and to score on, and a base model.

The questions come from the publishers' records, from a user's own files or from the stand-in. The base is the
published model, a file of the user's, or fresh random weights; on the stand-in it is trained on first use.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

import standin
from data import Example, download, load_examples, load_own_examples
from files import duration
from model import RWKV7, Config
from rounds import Round
from runs import CONTROLS
from tokenizer import Tokenizer

BASE_URL = "https://huggingface.co/BlinkDL/rwkv7-g1/resolve/main/"
CPU_TOKENS_PER_SECOND = 300    # as the 0.1b model reads them on one core of an AMD EPYC


class Material(NamedTuple):
    """The questions and the base model that both arms of a seed share."""

    source: str                # where the questions come from: "real", "own" or "standin", see runs.py
    train: list[Example]
    validation: list[Example]
    base: RWKV7                # read once: both arms start from these tensors
    base_name: str
    tokenizer: Tokenizer


def real_material(recipe: Round, base: str | None, assets: Path, offline: bool) -> Material:
    """The publishers' records and a base, downloaded where they are missing.

    FileNotFoundError, with a line for every file that cannot be had.
    """
    missing = []

    def found(load, *arguments, **named):
        """What `load` returns; where it finds no file, its message goes into `missing`."""
        try:
            return load(*arguments, **named)
        except FileNotFoundError as error:
            missing.append(str(error))

    rules = dict(assets=assets, offline=offline, order=recipe.order, max_prompt=recipe.max_prompt,
                 min_prompt=recipe.min_prompt, max_answer=recipe.max_answer, end_mark=recipe.end_mark,
                 arc_border=recipe.arc_border)
    train = found(load_examples, recipe.task, "train", n=recipe.n_train, seed=recipe.data_seed, **rules)
    validation = found(load_examples, recipe.task, "validation", n=recipe.n_val, seed=recipe.validation_seed,
                       **rules)
    model_and_name = found(find_base, recipe, base, assets, offline)
    if missing:
        raise FileNotFoundError("\n".join(missing))
    model, name = model_and_name
    check_vocabulary(model, name, train + validation)
    return Material("real", train, validation, model, name, Tokenizer())


def own_material(recipe: Round, train: list[Example], validation: list[Example], base: str | None,
                 assets: Path, offline: bool) -> Material:
    """A user's own questions, to train and to score on, and a base for them."""
    model, name = find_base(recipe, base, assets, offline)
    check_vocabulary(model, name, train + validation)
    return Material("own", train, validation, model, name, Tokenizer())


def own_examples(recipe: Round, data: Path) -> tuple[list[Example], list[Example]]:
    """A user's questions to train and to score on, as many as there are, up to n_train and n_val."""
    if recipe.task != "hotpotqa":
        raise ValueError(f"--data asks in HotpotQA's form, and {recipe.name} is a round of ARC-Challenge. "
                         "Use a round of HotpotQA, such as S20.")
    rules = dict(order=recipe.order, max_prompt=recipe.max_prompt, min_prompt=recipe.min_prompt,
                 max_answer=recipe.max_answer, end_mark=recipe.end_mark)
    return (load_own_examples(data, "train", n=recipe.n_train, **rules),
            load_own_examples(data, "validation", n=recipe.n_val, **rules))


def standin_material(recipe: Round, seed: int, assets: Path, device: torch.device,
                     surroundings: dict) -> Material:
    """The questions and the base of a stand-in run. The base is trained here on first use.

    Args: surroundings, the code version and the machine, which are written down beside the base.
    """
    base = standin.find_or_make_base(recipe, seed, assets, device, surroundings)
    return Material("standin", standin.training_examples(recipe, seed), standin.validation_examples(recipe),
                    base, "stand-in", standin.small_tokenizer())


def find_base(recipe: Round, base: str | None, assets: Path, offline: bool) -> tuple[RWKV7, str]:
    """A base model and its name.

    Args: base, as --base takes it: a path, or init or init:L12-D64 for fresh weights; None for the published
    file that the recipe names, which is downloaded into `assets` where it is missing.
    """
    if base is None:
        path = assets / "weights" / recipe.base
        if not path.exists():
            download(BASE_URL + recipe.base, path, RWKV7.load, offline)
        return RWKV7.load(path), path.name
    fresh = re.fullmatch(r"init(?::L([1-9]\d*)-D([1-9]\d*))?", base)
    if fresh:
        layers, width = int(fresh[1] or 12), int(fresh[2] or 768)
        if width % 16:    # the smallest head; a smaller one would drown in the epsilon of its norm
            raise ValueError(f"--base {base}: the width must be a multiple of 16")
        config = Config.published(layers, width, head_size=math.gcd(width, 64))
        return RWKV7.init(config, seed=0), f"init:L{layers}-D{width}"
    path = Path(base)
    return RWKV7.load(path), path.name


def check_vocabulary(base: RWKV7, name: str, examples: list[Example]) -> None:
    """ValueError where the examples hold tokens that the base does not know."""
    vocabulary = base.config.vocab_size
    largest = max(max(example.prompt + example.answer) for example in examples)
    if largest >= vocabulary:
        raise ValueError(f"{name} has a vocabulary of {vocabulary} tokens, and the examples hold token "
                         f"{largest}. Use a base with the RWKV World vocabulary.")


def cpu_time(recipe: Round, arms: list[str], tokens: float) -> str:
    """About how long a seed takes on one core of a CPU with the 0.1b model, in words.

    Args: tokens, of a prompt on average. A training step costs about 3 forward passes, or 4 with activation
    checkpointing.
    """
    passes = 3
    if recipe.checkpoint_activations:
        passes = 4
    evaluations = 1 + math.ceil(recipe.steps / recipe.eval_every)
    prompts = len(arms) * (passes * recipe.steps * recipe.batch_size + evaluations * recipe.n_val)
    if "prompt_fs" in arms:
        prompts += len(CONTROLS) * recipe.n_val
    return duration(prompts * tokens / CPU_TOKENS_PER_SECOND)
