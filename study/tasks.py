"""Five tasks that others made, but smaller: what is read, and under each token what is to be said there.

    python study/tasks.py    one small example of each, what is read over what is to be said

A task draws B sequences of n facts with rng, a NumPy generator: inputs (B, T) and targets (B, T), ids of
WORDS, with SILENT as the target where nothing is to be said. Training and test have an rng each. Nothing else
keeps their questions apart, but so many are possible that hardly one comes twice (in sudoku a few may).
Shapes: B sequences in a batch, T tokens in a sequence, n facts in a sequence.

A task of your own is a function like those below and a line in TASKS:

    def again(rng, B, n):
        # of n names, the first is to be said at the end
        names = rng.choice(NAME_IDS, (B, n))
        return said_last([names], names[:, 0])

    TASKS["again"] = Task(again, first=2, last=8, steps=200)
"""

import functools
import itertools
from typing import Callable, NamedTuple

import numpy as np

NAMES = """Ada Alan Amy Ann Ben Bob Carl Dan Eli Emma Eric Eva Finn Fred Gus Hal Ida Ivan Jack Jane Joe
    John Kai Kate Kim Lee Leo Lily Lou Luke Mary Max Mia Ned Nina Olga Otto Paul Pia Ron Rosa Sam Sue Ted
    Tim Tom Uma Zoe""".split()    # 48
VERBS = """adores avoids blames builds buys chases draws dreads enjoys fears finds fixes hates hides keeps
    likes loses loves misses paints praises sells studies wants""".split()    # 24
THINGS = """apples art bees birds boats books bread bugs cake caves chess clay clocks coins dogs eggs fire
    fish games glass golf gold hats honey ice jam kites lamps maps milk moss music opera pies poems rain rice
    rings rugs salt ships snow soup tea toys trains wine wool""".split()    # 48
STOP, ASK, WHO, BAR, HOLE = range(5)    # ids of the five words that come first in WORDS
WORDS = np.array([*". ? Who | _".split(), *NAMES, *VERBS, *THINGS])
NAME_IDS, VERB_IDS, THING_IDS = np.split(np.arange(5, len(WORDS)), [len(NAMES), len(NAMES) + len(VERBS)])
SILENT = -100    # the target where nothing is to be said; cross_entropy leaves it out


def shuffled(rng, B, ids):
    """All of the ids in every one of B rows, in an order of its own: (B, len(ids))."""
    return rng.permuted(np.tile(ids, (B, 1)), axis=1)


def said_last(parts, answer):
    """Joins the parts of a sequence, (B, any) each; `answer` (B,) is to be said at the last token."""
    inputs = np.concatenate(parts, axis=1)
    targets = np.full_like(inputs, SILENT)
    targets[:, -1] = answer
    return inputs, targets


def needle(rng, B, n, order):
    """Of n statements "name verb thing." one is asked for; a reader meets the name before the verb and thing.
    After reasoning-gym's needle_haystack, with 48 names, 24 verbs and 48 things where that has 2,738, 123 and
    500 of them."""
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
    Zoology's multi-query associative recall (arXiv:2312.04927). Every pair is read before it is asked for."""
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
    stand for the digits. After Future-Seed's authors, who compared 4 layers with 12: here both have 4."""
    boards = sudoku_boards()
    solved, holes = boards[rng.integers(len(boards), size=B)], np.zeros((B, 16), bool)
    for b in range(B):
        solutions = 0    # holes are drawn until they leave one solution
        while solutions != 1:
            holes[b] = rng.permutation(16) < n
            solutions = ((boards == solved[b]) | holes[b]).all(axis=1).sum()
    return np.where(holes, HOLE, solved), np.where(holes, solved, SILENT)


class Task(NamedTuple):
    make: Callable    # (rng, B, n) -> inputs (B, T), targets (B, T)
    first: int    # n in the first questions
    last: int     # n in the last ones, and in the test
    steps: int


def ordered(make, order):
    """A task's `make` with its order fixed; it keeps its docstring, which is printed."""
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


def show(rows, width=12):
    """Prints rows of words, {title: words}, one under the other, in pieces that fit a terminal."""
    for start in range(0, max(map(len, rows.values())), width):
        for title, words in rows.items():
            print(f"{title:11}" + "".join(f"{word:>9}" for word in words[start:start + width]).rstrip())
        print()


def in_words(ids, asked):
    """Ids (T,) as words; nothing where nothing is to be said."""
    return np.where(asked, WORDS[np.where(asked, ids, 0)], "")


if __name__ == "__main__":
    for title, task in TASKS.items():
        read, said = (rows[0] for rows in task.make(np.random.default_rng(0), 1, 4))
        print(f"{title}: {task.make.__doc__}\n")
        show({"read": WORDS[read], "to be said": in_words(said, said != SILENT)})
