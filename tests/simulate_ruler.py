"""How often the ruler is wrong, and what it sees: judge() on made-up experiments whose truth is known.

    python tests/simulate_ruler.py            the table below
    python tests/simulate_ruler.py 200        the same from 200 experiments a case, for a first look

An experiment is x[s, i] = seed[s] + question[i] + rest[s, i], S seeds on n questions. Question and rest are
Gaussian, the seeds follow one of the laws below, whose median is 0. An effect that is the same for all seeds
moves both ends of the interval by as much, which tests/test_stats.py checks, so one experiment serves for
every effect.

Percent of 10,000 experiments, by number of seeds. Wrong: positive or negative, whichever is worse, where the
seeds' median is 0; the worst of all QUESTIONS and NOISES below. Sees: positive where every seed has so much
more, with 512 questions, question and rest of deviations 0.2 and 0.45.

seeds:                         wrong        sees +0.02        sees +0.05         sees +0.3
                         6   10   20       6   10   20       6   10   20       6   10   20
none at all            0.5  0.5  0.9       6    8   18      68   83   97     100  100  100
Gaussian, 0.05         1.1  0.4  0.8       3    2    5      16   21   51     100  100  100
t(2), 0.05             1.0  0.5  0.8       2    2    4      12   14   39      91   99  100
a coin, +-0.225        1.8  1.2  2.3       2    1    2       2    1    2      99  100  100
+-0.45, one in ten     0.4  0.5  0.8       5    6   16      50   69   95      73   92  100
+0.45, one in ten      0.7  0.5  1.1       8   10   23      70   85   98     100  100  100
+0.45, four in ten     5.9  6.3 17.2      18   24   52      79   92  100     100  100  100
as R6                  1.2  0.8  1.3       5    6   14      38   53   88     100  100  100
as R9b                 1.3  0.9  1.5       5    5   13      36   50   85     100  100  100
as S5                  0.9  0.8  1.1       2    2    3      17   23   53     100  100  100
wrongly "no effect larger than 0.02": 0.3 at most

Shapes: S seeds, n questions, E experiments.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stats import EFFECT, judge

# d_acc of the stand-in's ten seeds in three rounds of the study (README.md)
STUDY = {
    "as R6": [0.00, 0.07, -0.01, 0.01, -0.01, -0.05, -0.02, 0.13, 0.00, 0.43],
    "as R9b": [-0.02, 0.13, -0.03, 0.09, 0.00, -0.03, -0.07, 0.37, -0.01, -0.03],
    "as S5": [-0.01, 0.15, 0.07, 0.02, -0.02, 0.00, -0.03, 0.03, 0.03, 0.49],
}


def from_study(name):
    deltas = np.array(STUDY[name]) - np.median(STUDY[name])
    return lambda rng, S: rng.choice(deltas, S)


SYMMETRIC = {
    "none at all": lambda rng, S: np.zeros(S),
    "Gaussian, 0.05": lambda rng, S: rng.normal(0, 0.05, S),
    "t(2), 0.05": lambda rng, S: 0.05 * rng.standard_t(2, S),
    "a coin, +-0.225": lambda rng, S: rng.choice([-0.225, 0.225], S),
    "+-0.45, one in ten": lambda rng, S: rng.choice([-0.45, 0, 0.45], S, p=[0.05, 0.9, 0.05]),
}
# the median is 0 and the mean is not
LOPSIDED = {
    "+0.45, one in ten": lambda rng, S: rng.choice([0, 0.45], S, p=[0.9, 0.1]),
    "+0.45, four in ten": lambda rng, S: rng.choice([0, 0.45], S, p=[0.6, 0.4]),
} | {name: from_study(name) for name in STUDY}
SEEDS = (6, 10, 20)
QUESTIONS = (200, 512)
NOISES = ((0.2, 0.45), (0.4, 0.3), (0.05, 0.45))    # deviations of question and rest
EFFECTS = (0.02, 0.05, 0.3)


def intervals(laws: dict, S: int, n: int, noise: tuple, experiments: int) -> dict:
    """By law, the low and the high ends (E, 2) of judge's interval. All laws meet the same noise."""
    rng = np.random.default_rng(S)
    ends = {name: np.empty((experiments, 2)) for name in laws}
    for e in range(experiments):
        x = rng.normal(0, noise[1], (S, n)) + rng.normal(0, noise[0], n)
        for name, law in laws.items():
            ends[name][e] = judge(x + law(rng, S)[:, None])[1:]
    return ends


def wrong(ends) -> float:
    """Share of positive or of negative verdicts, whichever is larger, where the median is 0."""
    low, high = ends.T
    return max((low > 0).mean(), (high < 0).mean())


def wrongly_no_effect(ends) -> float:
    """Share of "no effect larger than" EFFECT, where the median is EFFECT or more, at either side."""
    low, high = ends.T
    return max(((low > -2 * EFFECT) & (high < 0)).mean(), ((low > 0) & (high < 2 * EFFECT)).mean())


def seen(ends, effect: float) -> float:
    """Share of positive verdicts where every seed has this much more."""
    return (ends[:, 0] + effect > 0).mean()


def table(experiments: int) -> str:
    """The table of this file's docstring."""
    laws = SYMMETRIC | LOPSIDED
    missed = 0.0
    columns = {name: [] for name in laws}    # by S, a list of percentages
    for S in SEEDS:
        worst = dict.fromkeys(laws, 0.0)
        for n in QUESTIONS:
            for noise in NOISES:
                found = intervals(laws, S, n, noise, experiments)
                for name, ends in found.items():
                    worst[name] = max(worst[name], wrong(ends))
                    missed = max(missed, wrongly_no_effect(ends))
                if (n, noise) == (QUESTIONS[-1], NOISES[0]):
                    power = {name: [seen(ends, effect) for effect in EFFECTS] for name, ends in found.items()}
        for name in laws:
            columns[name].append([worst[name], *power[name]])
    heads = ["wrong", *(f"sees +{effect}" for effect in EFFECTS)]
    lines = [f"{'seeds:':<18}" + "".join(f"{head:>18}" for head in heads)]
    lines.append(" " * 18 + len(heads) * ("   " + "".join(f"{S:5}" for S in SEEDS)))
    for name in laws:
        shares = 100 * np.array(columns[name]).T    # (heads, seeds)
        first, *others = shares
        cells = ["".join(f"{share:5.1f}" for share in first)]
        cells += ["".join(f"{share:5.0f}" for share in row) for row in others]
        lines.append(f"{name:<18}" + "".join("   " + cell for cell in cells))
    return "\n".join([*lines, f'wrongly "no effect larger than {EFFECT}": {100 * missed:.1f} at most'])


if __name__ == "__main__":
    print(table(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
