"""Future-Seed in one plain training loop, on tasks that others made, from scratch, on one core of a CPU.

    python study/from_scratch.py directional       the demonstration, in about a minute
    python study/from_scratch.py needle --seed 3   another task of TASKS

Two models start from the same weights and take the same batches: a plain RWKV-7, and one with Future-Seed,
whose layer i starts to read where layer i-1 has stopped (fs.py). Nothing is pretrained. Questions are small
at first and grow at one pace for both models. A task returns the tokens that are read, and under each of
them the token that is to be said there. All questions are fresh; those of the test have a seed of their own.
Shapes: B sequences in a batch, T tokens in a sequence, n facts in a question, C channels.
"""

import argparse
import functools
import inspect
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fs import FutureSeed, prefill    # noqa: E402
from model import Config, RWKV7    # noqa: E402

# one recipe for all tasks; LOG.md tells how it was chosen
LAYERS, CHANNELS, HEAD_SIZE, RANK = 4, 64, 16, 8
BATCH, LR, WARM_UP = 32, 4e-3, 50
GROW, GROWN, DECAY = 0.4, 0.75, 0.8    # as shares of the steps: questions grow from, to; the rate falls from
TEST = 256                            # sequences in the test: of full size, and the same for every seed
SEED_STATES = dict(alpha=-2.0, layer_start=1, detach=False, clip=1.0, gate="heads", train_alpha=True)

NAMES = """Ada Alan Amy Ann Ben Bob Carl Dan Eli Emma Eric Eva Finn Fred Gus Hal Ida Ivan Jack Jane Joe
    John Kai Kate Kim Lee Leo Lily Lou Luke Mary Max Mia Ned Nina Olga Otto Paul Pia Ron Rosa Sam Sue Ted
    Tim Tom Uma Zoe""".split()    # 48
VERBS = """adores avoids blames builds buys chases draws dreads enjoys fears finds fixes hates hides keeps
    likes loses loves misses paints praises sells studies wants""".split()    # 24
THINGS = """apples art bees birds boats books bread bugs cake caves chess clay clocks coins dogs eggs fire
    fish games glass golf gold hats honey ice jam kites lamps maps milk moss music opera pies poems rain rice
    rings rugs salt ships snow soup tea toys trains wine wool""".split()    # 48
STOP, ASK, WHO, BAR, HOLE = range(5)
WORDS = np.array([*". ? Who | _".split(), *NAMES, *VERBS, *THINGS])
NAME_IDS, VERB_IDS, THING_IDS = np.split(np.arange(5, len(WORDS)), [len(NAMES), len(NAMES) + len(VERBS)])
SILENT = -100    # the target where nothing is to be said; cross_entropy leaves it out


# ---- tasks: random stream, B, n -> inputs (B, T), targets (B, T) -------------------------------------------

def shuffled(rng, B, ids):
    return rng.permuted(np.tile(ids, (B, 1)), axis=1)


def said_last(parts, answer):
    """Joins the parts of a sequence, (B, any) each; `answer` (B,) is to be said at the last token."""
    inputs = np.concatenate(parts, axis=1)
    targets = np.full_like(inputs, SILENT)
    targets[:, -1] = answer
    return inputs, targets


def needle(rng, B, n, order):
    """Of n statements "name verb thing." one is asked for; a reader meets the name before the verb and thing.
    After reasoning-gym's needle_haystack, with 48, 24 and 48 words where it has 2,738, 123 and 500."""
    names, verbs = rng.choice(NAME_IDS, (B, n)), rng.choice(VERB_IDS, (B, n))
    things = shuffled(rng, B, THING_IDS)[:, :n]    # they differ, so that one answer is right
    text = np.stack([names, verbs, things, np.full((B, n), STOP)], axis=2).reshape(B, 4 * n)
    asked = np.arange(B), rng.integers(n, size=B)
    question = np.stack([np.full(B, WHO), verbs[asked], things[asked], np.full(B, ASK)], axis=1)
    parts = {"last": [text, question], "first": [question, text, question[:, -1:]],
             "both ends": [question, text, question], "read twice": [text, question, text, question]}
    return said_last(parts[order], names[asked])


def intersection(rng, B, n, order):
    """Two lists, of n words and of 4, share a word: which? The set intersection of JRT (arXiv:2407.05483)."""
    words = shuffled(rng, B, np.concatenate([NAME_IDS, THING_IDS]))
    long = rng.permuted(words[:, :n], axis=1)
    short = rng.permuted(np.concatenate([words[:, :1], words[:, n:n + 3]], axis=1), axis=1)
    bar, ask = np.full((B, 1), BAR), np.full((B, 1), ASK)
    parts = {"long list first": [long, bar, short, ask], "short list first": [short, bar, long, ask]}
    return said_last(parts[order], words[:, 0])


def recall(rng, B, n):
    """n pairs of a name and a thing, then each name again, in another order: which thing was with it?
    Zoology's multi-query associative recall (arXiv:2312.04927). No reader has to know what comes later."""
    names, things = shuffled(rng, B, NAME_IDS)[:, :n], rng.choice(THING_IDS, (B, n))
    asked = np.arange(B)[:, None], shuffled(rng, B, np.arange(n))
    pairs = np.stack([names, things], axis=2).reshape(B, 2 * n)
    silence = np.full_like(pairs, SILENT)
    return np.concatenate([pairs, names[asked]], axis=1), np.concatenate([silence, things[asked]], axis=1)


def directional(rng, B, n):
    """n pairs "name thing" and n queries "name ?", mixed; a query is answered where it stands, though its
    pair may come only later. By Future-Seed's authors: a task made to fit what Future-Seed does. The scores
    are of the queries whose pair stands before them, and of those whose pair comes later."""
    names, things = shuffled(rng, B, NAME_IDS)[:, :n], rng.choice(THING_IDS, (B, n))
    item = shuffled(rng, B, np.arange(2 * n))    # below n it is a pair, from n on a query
    name, thing = (np.take_along_axis(x, item % n, axis=1) for x in (names, things))
    inputs = np.stack([name, np.where(item < n, thing, ASK)], axis=2)
    targets = np.stack([np.full_like(name, SILENT), np.where(item < n, SILENT, thing)], axis=2)
    return inputs.reshape(B, 4 * n), targets.reshape(B, 4 * n)


def comes_later(inputs):
    """Where a directional query stands whose pair comes later: (B, T) bool."""
    name, query = inputs[:, ::2], inputs[:, 1::2] == ASK
    pair_of = (name[:, :, None] == name[:, None, :]) & ~query[:, None, :]    # (B, item, item)
    later = query & (pair_of.argmax(axis=2) > np.arange(name.shape[1]))
    return np.stack([np.zeros_like(later), later], axis=2).reshape(inputs.shape)


@functools.cache
def sudoku_boards():
    """All 288 solved 4x4 boards, (288, 16): each row, column and box holds four different digits."""
    boards = []
    for rows in itertools.product(itertools.permutations(THING_IDS[:4]), repeat=4):
        boxes = [rows[i][j:j + 2] + rows[i + 1][j:j + 2] for i in (0, 2) for j in (0, 2)]
        if all(len(set(cells)) == 4 for cells in (*zip(*rows), *boxes)):
            boards.append(sum(rows, ()))
    return np.array(boards)


def sudoku(rng, B, n):
    """A 4x4 board, row by row, with n holes and one solution; each hole is filled where it stands. Four words
    stand for the digits. After Future-Seed's authors, who compared 4 layers with 12; here both have 4."""
    boards = sudoku_boards()
    solved, holes = boards[rng.integers(len(boards), size=B)], np.zeros((B, 16), bool)
    for b in range(B):
        solutions = 0
        while solutions != 1:
            holes[b] = rng.permutation(16) < n
            solutions = ((boards == solved[b]) | holes[b]).all(axis=1).sum()
    return np.where(holes, HOLE, solved), np.where(holes, solved, SILENT)


class Task(NamedTuple):
    make: Callable
    first: int    # n in the first questions
    last: int     # n in the last ones, and in the test
    steps: int


def ordered(make, order):
    return functools.update_wrapper(functools.partial(make, order=order), make)


TASKS = {
    "needle": Task(ordered(needle, "last"), 2, 12, 900),
    "needle-first": Task(ordered(needle, "first"), 2, 12, 900),
    "needle-both": Task(ordered(needle, "both ends"), 2, 12, 900),
    "needle-twice": Task(ordered(needle, "read twice"), 2, 12, 900),
    "intersection": Task(ordered(intersection, "long list first"), 4, 16, 600),
    "intersection-short": Task(ordered(intersection, "short list first"), 4, 16, 600),
    "recall": Task(recall, 2, 8, 400),
    "directional": Task(directional, 2, 8, 400),
    "sudoku": Task(sudoku, 2, 8, 600),
}


def scores(task, inputs, targets, said):
    """Shares of right answers, by name; inputs, targets and said (B, T)."""
    asked, right = targets != SILENT, said == targets
    if task == "directional":
        later = comes_later(inputs)
        return {"before": right[asked & ~later].mean(), "later": right[later].mean()}
    if task == "sudoku":
        return {"cells": right[asked].mean(), "boards": (right | ~asked).all(axis=1).mean()}
    return {"right": right[asked].mean()}


# ---- two models, one loop ----------------------------------------------------------------------------------

class Arm(NamedTuple):
    model: RWKV7
    fs: FutureSeed | None
    optimizer: torch.optim.Optimizer


def new_arm(seed, future_seed):
    model = RWKV7.init(Config(LAYERS, CHANNELS, HEAD_SIZE, len(WORDS), 2 * CHANNELS, *[RANK] * 4), seed)
    # the published 1e-4 suits long runs: here most of the steps would go into growing the embedding
    torch.nn.init.uniform_(model.emb.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    parameters, fs = list(model.parameters()), None
    if future_seed:
        fs = FutureSeed(model.config, **SEED_STATES)
        parameters += fs.parameters()
    return Arm(model, fs, torch.optim.AdamW(parameters, LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True))


def train_step(arm, inputs, targets, lr):
    for group in arm.optimizer.param_groups:
        group["lr"] = lr
    hidden, _ = prefill(arm.model, inputs, fs=arm.fs)    # (B, T, C)
    asked = targets != SILENT
    loss = F.cross_entropy(arm.model.head(hidden[asked]), targets[asked])
    arm.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(arm.model.parameters(), 1.0)
    arm.optimizer.step()


@torch.no_grad()
def answers(arm, inputs):
    """What the arm would say at every token, (B, T)."""
    hidden, _ = prefill(arm.model, torch.tensor(inputs), fs=arm.fs)
    return arm.model.head(hidden).argmax(dim=-1).numpy()


def ramp(x, start, end):
    """0 up to start, 1 from end on, a straight line between them."""
    return min(1.0, max(0.0, (x - start) / (end - start)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the questions")
    parser.add_argument("--out", type=Path, help="append the results to this file, as a line of JSON")
    options = parser.parse_args()
    task = TASKS[options.task]
    torch.set_num_threads(1)
    print(inspect.cleandoc(task.make.__doc__), end="\n\n")
    test_inputs, test_targets = task.make(np.random.default_rng(2 ** 31), TEST, task.last)
    arms = {"plain": new_arm(options.seed, False), "Future-Seed": new_arm(options.seed, True)}
    rng, began, curve = np.random.default_rng(options.seed), time.time(), {}
    for step in range(1, task.steps + 1):
        done = step / task.steps
        n = task.first + int((task.last - task.first) * ramp(done, GROW, GROWN))
        inputs, targets = map(torch.tensor, task.make(rng, BATCH, n))
        lr = LR * min(1.0, step / WARM_UP) * (1 - ramp(done, DECAY, 1.0))
        for arm in arms.values():
            train_step(arm, inputs, targets, lr)
        if step % (task.steps // 10) > 0:
            continue
        said = {name: answers(arm, test_inputs) for name, arm in arms.items()}
        shares = {name: scores(options.task, test_inputs, test_targets, said[name]) for name in arms}
        curve[step] = {f"{score}, {name}": round(float(shares[name][score]), 4)
                       for score in shares["plain"] for name in arms}
        if len(curve) == 1:
            print("step   n " + "".join(f"{title:21}" for title in curve[step]).rstrip())
        bars = "".join(f"{'#' * round(12 * share):.<12} {share:.2f}    " for share in curve[step].values())
        print(f"{step:4} {n:3} {bars}{(time.time() - began) * (1 / done - 1):3.0f} s left", flush=True)

    print("\nThe first question of the test, and what the two models say; [brackets] mark what is wrong.\n")
    asked, right = test_targets[0] != SILENT, WORDS[test_targets[0]]
    rows = {"read": WORDS[test_inputs[0]], "right": np.where(asked, right, "")}
    for name in arms:
        word = WORDS[said[name][0]]
        wrong = np.char.add(np.char.add("[", word), "]")
        rows[name] = np.where(asked, np.where(word == right, word, wrong), "")
    for start in range(0, len(asked), 12):    # columns that fit a terminal
        for title, words in rows.items():
            print(f"{title:11}" + "".join(f"{word:>9}" for word in words[start:start + 12]).rstrip())
        print()
    for title, share in curve[task.steps].items():
        print(f"{title:20} {share:6.1%} right after {task.steps} steps")
    if options.out:
        answered = {name: said[name][test_targets != SILENT].tolist() for name in arms}
        result = {"task": options.task, "seed": options.seed, "seconds": round(time.time() - began),
                  "curve": curve, "said": answered}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
