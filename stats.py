"""Statistics of paired runs, in plain numpy: the ruler for seeds that are all or nothing.

Every function takes differences, prompt_fs minus no_fs, of the same seed on the same question.

What is claimed. `judge` speaks of the typical seed: the median over seeds of the measured difference. The 2nd
smallest and the 2nd largest of ten seeds hold it between them in 97.9% of draws, whatever the distribution of
seeds. It is the sign test turned round: do more seeds gain than lose? Below six seeds nothing is claimed.

Why not the mean. Ten seeds without a jump are no surprise (6%) even if one seed in four jumps, and at +0.45
that is +0.12 in the mean. An interval that allows for it is too wide to use; one that does not, as Student's,
is wrong. The mean is a description, and jumps are counted and tested on their own.

Why the questions matter. All seeds answer the same n questions, so two sources of chance are crossed:

    x[s, i] = effect + seed[s] + question[i] + rest[s, i]

The mean of question[i] moves all seeds alike, and seeds alone would take that shift for an effect. Its
variance is var(question) / n, with var(question) = (MS_question - MS_rest) / S from the analysis of variance,
and both ends move outwards by 1.96 of its deviations. In quadrature that fails where half of the seeds jump.

Simulated by tests/simulate_ruler.py: percent of 10,000 experiments, by number of seeds. Wrong: positive or
negative, whichever is worse, where the seeds' median is 0; the worst of 200 and 512 questions and three kinds
of noise. Sees: positive at that median, with 512 questions, question and rest of deviations 0.2 and 0.45.

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

What it cannot say: where four seeds in ten jump and six do not move, the noise of the six lifts the measured
median above 0. "Positive" then says that more seeds gain than lose, and no more: look at the jumps.

References: David & Nagaraja, Order Statistics, 2003; Searle, Casella & McCulloch, Variance Components, 1992;
Clopper & Pearson, Biometrika 26, 1934; McNemar, Psychometrika 12, 1947; Holm, Scand. J. Statistics 6, 1979.
Shapes: S seeds, n questions, R repeats; "..." any further axes.
"""

import math

import numpy as np

EFFECT = 0.02    # the smallest difference in accuracy worth a claim; the log's largest mean is 0.034
JUMP = 0.5       # an arm on the stand-in that ends above this has learned it; guesses give 0.2 or less
MIN_SEEDS = 6    # the smallest and the largest of six seeds are the first pair with 95%
RULE = f"""The verdict is about the typical seed: the median over seeds of d_acc, with its 95% interval.
positive: the interval lies above 0.
negative: the interval lies below 0.
no effect larger than {EFFECT}: the interval lies between -{EFFECT} and +{EFFECT}.
inconclusive: anything else, and always with fewer than {MIN_SEEDS} seeds."""


# ---- the verdict on a round --------------------------------------------------------------------------------

def judge(x) -> tuple[str, float, float]:
    """RULE applied to x (S, n): the verdict, and the 95% interval of the median over seeds, low and high.

    With fewer than six seeds, or a single question, the interval is the whole line, from -inf to inf. Arms
    that answer alike everywhere show no effect, if the questions are enough.
    """
    S, n = x.shape
    rank = median_rank(S)
    if rank == 0 or n == 1:
        return "inconclusive", -math.inf, math.inf
    deltas = np.sort(x.mean(axis=1))
    shift = 1.96 * math.sqrt(question_variance(x) / n)
    low = float(deltas[rank - 1] - shift)
    high = float(deltas[S - rank] + shift)
    if low > 0:
        return "positive", low, high
    if high < 0:
        return "negative", low, high
    if -EFFECT < low and high < EFFECT:
        return f"no effect larger than {EFFECT}", low, high
    return "inconclusive", low, high


def median_rank(S: int) -> int:
    """The largest r for which the r-th smallest and r-th largest of S seeds hold the median in 95% of draws
    or more; 0 if there is none. The median is outside if fewer than r seeds, fair coins, lie on one side."""
    rank = 0
    while 2 * at_most(rank, S, 0.5) <= 0.05:
        rank += 1
    return rank


def question_variance(x) -> float:
    """var(question) of x (S, n), never below 2 / n.

    The 2 / n is one more question that moved up by 1 in all seeds, and one that moved down. Else four that
    moved up by luck would pass for an effect, where the exact sign test wants six, and questions of which
    none moved would leave no doubt about the next one.
    """
    S, n = x.shape
    question = x.mean(axis=0)
    rest = x - question - x.mean(axis=1, keepdims=True) + x.mean()
    ms_question = S * question.var(ddof=1)
    ms_rest = (rest ** 2).sum() / ((S - 1) * (n - 1))
    return float(np.maximum((ms_question - ms_rest) / S, 0)) + 2 / n


# ---- counts of seeds ---------------------------------------------------------------------------------------

def at_most(k: int, n: int, chance: float) -> float:
    """Chance of k successes or fewer in n independent trials."""
    return sum(math.comb(n, i) * chance ** i * (1 - chance) ** (n - i) for i in range(k + 1))


def gains_and_losses(deltas) -> tuple[int, int]:
    """How many seeds gain and how many lose; a difference of equal sums may be 1e-17, which is neither."""
    deltas = np.asarray(deltas, dtype=float)
    return int((deltas > 1e-12).sum()), int((deltas < -1e-12).sum())


def signs(deltas) -> str:
    """The log's sign(+/0/-): how many seeds gain, stay and lose, as in "3/0/1"."""
    gains, losses = gains_and_losses(deltas)
    return f"{gains}/{len(deltas) - gains - losses}/{losses}"


def sign_test(deltas) -> float:
    """Exact two-sided p that a seed gains as often as it loses, over the seeds that do either."""
    gains, losses = gains_and_losses(deltas)
    return min(1.0, 2 * at_most(min(gains, losses), gains + losses, 0.5))


def mcnemar(jumped_without, jumped_with) -> float:
    """Exact two-sided p that a seed jumps as often in one arm as in the other (McNemar), from booleans, one a
    seed. Seeds that jump in both arms or in neither say nothing about it."""
    return sign_test(np.asarray(jumped_with, dtype=float) - np.asarray(jumped_without, dtype=float))


def chance_to_gain(deltas) -> tuple[float, float, float]:
    """The share of seeds that gain, and its exact 95% interval, low and high (Clopper & Pearson)."""
    gains, _ = gains_and_losses(deltas)
    S = len(deltas)
    return gains / S, 1 - largest_chance(S - gains, S), largest_chance(gains, S)


def largest_chance(k: int, n: int) -> float:
    """The largest chance of success at which k successes or fewer in n trials still come in 2.5% of cases."""
    if k == n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):    # bisection, as the probability falls with the chance
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(k, n, middle) > 0.025 else (low, middle)
    return low


def holm(p_values) -> np.ndarray:
    """p-values corrected for their number (Holm), in the order given: the smallest of m times m, the next
    times m - 1, and so on, and none smaller than the one before it."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1)
    return corrected


# ---- within a seed -----------------------------------------------------------------------------------------

def bootstrap_interval(x, repeats: int = 2000):
    """Paired bootstrap: low and high, each (...,), of the 95% interval of the mean over the n questions of x
    (n, ...), by percentiles. It allows for other questions, not for other seeds."""
    n = len(x)
    rng = np.random.default_rng(0)
    drawn = rng.integers(n, size=(repeats, n)) + n * np.arange(repeats)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=repeats * n).reshape(repeats, n)    # (R, n)
    return np.quantile(np.tensordot(counts, x, axes=1) / n, [0.025, 0.975], axis=0)
