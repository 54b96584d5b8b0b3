"""Statistics of paired runs, in plain numpy: the ruler for seeds that are all or nothing.

Every function takes differences, prompt_fs minus no_fs, of the same seed on the same question.

What is claimed. `judge` speaks of the typical seed: the median over seeds of the measured difference. The 2nd
smallest and the 2nd largest of ten seeds hold it between them in 97.9% of draws, whatever the distribution of
seeds. It is the sign test turned round: do more seeds gain than lose? Below six seeds nothing is claimed.

Why not the mean. Ten seeds without a jump are no surprise (6%) even if one seed in four jumps, and at +0.45
that is +0.11 in the mean. An interval that allows for it is too wide to use; one that does not, as Student's,
is wrong. The mean is a description, and jumps are counted and tested on their own.

Why the questions matter. All seeds answer the same n questions, so two sources of chance are crossed:

    x[s, i] = effect + seed[s] + question[i] + rest[s, i]

The mean of question[i] moves all seeds alike, and seeds alone would take that shift for an effect. Its
variance is var(question) / n, with var(question) = (MS_question - MS_rest) / S from the analysis of variance.
So both ends of the interval move outwards by 1.96 of its standard deviations. They move by the whole of it:
adding the two widths in quadrature fails where half of the seeds jump.

Simulated by tests/simulate_ruler.py, whose docstring has the table: where the seeds' median is 0, at most
2.3% of experiments come out positive, and as few negative, for nine kinds of seeds.

What it cannot say: where four seeds in ten jump and six do not move, the noise of the six lifts the measured
median above 0, and "positive" comes out in 6 to 17%. It then says that more seeds gain than lose, no more:
look at the jumps.

References: David & Nagaraja, Order Statistics, 2003; Searle, Casella & McCulloch, Variance Components, 1992;
Clopper & Pearson, Biometrika 26, 1934; McNemar, Psychometrika 12, 1947; Holm, Scand. J. Statistics 6, 1979.
Shapes: S seeds, n questions.
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
    """The largest r for which the r-th smallest and the r-th largest of S seeds hold the median between them
    in 95% of draws or more; 0 if there is none.

    A seed lies on either side of the median with chance 1/2, as a fair coin falls. The median is outside
    where fewer than r seeds lie on one of its sides.
    """
    rank = 0
    while 2 * at_most(rank, S, 0.5) <= 0.05:
        rank += 1
    return rank


def question_variance(x) -> float:
    """var(question) of x (S, n), never below 2 / n.

    The 2 / n stands for one more question that moved up by 1 in all seeds, and one that moved down. Without
    it four questions that moved up by luck would pass for an effect, where the exact sign test wants six; and
    if no question moved, there would be no doubt about the next one.
    """
    S, n = x.shape
    question = x.mean(axis=0)
    rest = x - question - x.mean(axis=1, keepdims=True) + x.mean()
    ms_question = S * question.var(ddof=1)
    ms_rest = (rest ** 2).sum() / ((S - 1) * (n - 1))
    return float(np.maximum((ms_question - ms_rest) / S, 0)) + 2 / n


# ---- counts of seeds ---------------------------------------------------------------------------------------

def at_most(k: int, n: int, chance):
    """Chance of k successes or fewer in n independent trials, for a chance of each, or an array of them."""
    return sum(math.comb(n, i) * chance ** i * (1 - chance) ** (n - i) for i in range(k + 1))


def gains_and_losses(deltas) -> tuple[int, int]:
    """How many seeds gain and how many lose. Rounding may leave 1e-17 of a difference of 0: it is neither."""
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
    """Exact two-sided p that a seed jumps as often in one arm as in the other (McNemar).

    Args: whether each seed jumped, by arm. Seeds that jump in both arms or in neither say nothing about it.
    """
    return sign_test(np.asarray(jumped_with, dtype=float) - np.asarray(jumped_without, dtype=float))


def chance_to_gain(deltas) -> tuple[float, float, float]:
    """The share of seeds that gain, and its exact 95% interval, low and high (Clopper & Pearson)."""
    gains, _ = gains_and_losses(deltas)
    S = len(deltas)
    return gains / S, 1 - largest_chance(S - gains, S), largest_chance(gains, S)


def largest_chance(k: int, n: int) -> float:
    """The largest chance of success at which k successes or fewer in n trials still come in 2.5% of cases."""
    chances = np.linspace(0, 1, 100_001)
    return float(chances[at_most(k, n, chances) > 0.025].max())


def holm(p_values) -> np.ndarray:
    """p-values corrected for their number (Holm), in the order given.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none becomes smaller than the one
    before it.
    """
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1)
    return corrected
