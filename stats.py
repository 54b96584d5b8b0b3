"""Statistics of paired runs, in plain numpy: how sure is a difference, and what would make it surer?

All functions take differences per example, one arm minus the other on the same question, so that what makes a
question hard cancels out. All seeds answer the same n questions, so two sources of chance are crossed:

    x[s, i] = mean + seed[s] + question[i] + rest[s, i]
    var(mean of x) = var(seed)/S + var(question)/n + var(rest)/(S n)

and an interval must allow for other seeds and for other questions. A t interval over the seeds' means misses
var(question)/n. Resampling seeds, then questions, and taking percentiles covers 75 to 90% from 3 seeds: 3
resampled seeds show 2/3 of their variance, and nothing tells the bootstrap that it knows this variance from
2 degrees of freedom. `over_seeds` is that hierarchical bootstrap's variance in closed form, without its bias
and with Student's tails.

References: the analysis of variance with two crossed random factors (Searle, Casella & McCulloch, Variance
Components, 1992); Owen, The pigeonhole bootstrap, 2007; Hesterberg, What teachers should know about the
bootstrap, 2015.
Shapes: S seeds, n examples, K evaluations, M metrics, R repeats; "..." any number of independent experiments.
"""

import functools
import math
from statistics import NormalDist

import numpy as np

EFFECT = 0.02         # the smallest difference in accuracy worth a claim; the log's largest mean is 0.034
JUMP = 0.5            # an arm on the stand-in that ends above this has learned it; guesses give 0.2 or less
RULE = (
    "positive: the 95% interval of the mean d_acc over seeds lies above 0; negative: it lies below 0; "
    f"no effect larger than {EFFECT}: it lies between -{EFFECT} and +{EFFECT}; inconclusive: anything else, "
    "and always with a single seed, or where the arms differ in nothing"
)
POWER = 0.8           # "to see an effect" means to see it in so many of all repetitions
EXACT_FLIPS = 12      # up to so many values, all 2^12 sign patterns are tried


def verdict(low: float, high: float, seeds: int) -> str:
    """RULE, decided before any run of this project was looked at."""
    if seeds < 2 or low == high == 0:
        return "inconclusive"
    if low > 0:
        return "positive"
    if high < 0:
        return "negative"
    return f"no effect larger than {EFFECT}" if -EFFECT < low and high < EFFECT else "inconclusive"


# ---- Student's t -------------------------------------------------------------------------------------------

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
log_gamma = np.vectorize(math.lgamma, otypes=[float])


def t_peak(df):
    """Density of |T| at 0 for Student's t with df degrees of freedom."""
    return 2 / np.sqrt(df * math.pi) * np.exp(log_gamma((df + 1) / 2) - log_gamma(df / 2))


def t_central(t, df):
    """P(|T| <= t) for t >= 0 and df >= 1, elementwise, with an error below 1e-10.

    With t = sqrt(df) tan(angle) the density becomes cos(angle)^(df - 1), easy prey for Gauss-Legendre.
    """
    t, df = np.broadcast_arrays(np.asarray(t, dtype=float), np.asarray(df, dtype=float))
    # beyond 9 / sqrt(df) the integrand is below exp(-40): cut there, so that the nodes stay where it lives
    angle = np.minimum(np.arctan(t / np.sqrt(df)), 9 / np.sqrt(df))
    heights = np.cos(angle[..., None] * (NODES + 1) / 2) ** (df[..., None] - 1)    # (..., 64)
    return np.minimum(t_peak(df) * np.sqrt(df) * angle / 2 * (heights @ WEIGHTS), 1.0)


def t_quantile(central: float, df):
    """The t with P(|T| <= t) = central, elementwise over df.

    By Newton's method: the probability is concave in t, and the normal quantile, where it starts, is below
    the answer, so that it climbs and never overshoots.
    """
    df = np.asarray(df, dtype=float)
    t = np.full(df.shape, NormalDist().inv_cdf((1 + central) / 2))
    peak = t_peak(df)
    for _ in range(16):
        density = peak * (1 + t ** 2 / df) ** (-(df + 1) / 2)
        t = t + (central - t_central(t, df)) / density
    return t


def t_test(values) -> tuple[float, float, float]:
    """Mean of S >= 2 values, half its 95% interval, and the two-sided p-value of a mean of 0."""
    values = np.asarray(values, dtype=float)
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    df = len(values) - 1
    if error == 0:
        return float(mean), 0.0, float(mean == 0)
    return float(mean), float(t_quantile(0.95, df) * error), float(1 - t_central(abs(mean) / error, df))


# ---- over seeds --------------------------------------------------------------------------------------------

def components(x):
    """x (..., S, n) -> var(seed) + var(rest)/n, var(question), var(rest), each (...,), unbiased but for
    a question variance below 0, which becomes 0."""
    S, n = x.shape[-2:]
    mean = x.mean(axis=(-2, -1), keepdims=True)
    seed = x.mean(axis=-1, keepdims=True) - mean
    question = x.mean(axis=-2, keepdims=True) - mean
    rest = ((x - mean - seed - question) ** 2).sum(axis=(-2, -1)) / ((S - 1) * (n - 1))
    by_seed = (seed ** 2).sum(axis=(-2, -1)) / (S - 1)
    by_question = (question ** 2).sum(axis=(-2, -1)) / (n - 1)
    return by_seed, np.maximum(by_question - rest / S, 0), rest


def half_width(by_seed, question, S, n):
    """Half the 95% interval of the mean over S seeds and n questions, elementwise.

    Args: by_seed, var(seed) + var(rest)/n, guessed from S - 1 degrees of freedom; question, var(question),
        from n - 1.
    Two classical answers exist: each part with its own t (Cochran) covers 95.0 to 97.7% at S = 3; one t with
    the degrees of freedom of the sum (Satterthwaite) covers 92.2 to 95.0%. Half way between them covers 94.2
    to 96.7% at S = 3, 94.7 to 96.2% at 4, 94.8 to 95.8% at 5, and 93.1 to 98.1% at 2, whatever the mixture.
    """
    S, n = np.asarray(S, dtype=float), np.asarray(n, dtype=float)
    a, b = by_seed / S, question / n
    cochran = np.sqrt(t_quantile(0.95, S - 1) ** 2 * a + t_quantile(0.95, n - 1) ** 2 * b)
    # where both are 0 so is the interval, whatever df
    df = (a + b) ** 2 / np.maximum(a ** 2 / (S - 1) + b ** 2 / (n - 1), 1e-300)
    satterthwaite = t_quantile(0.95, np.clip(df, 1, S + n)) * np.sqrt(a + b)
    return (cochran + satterthwaite) / 2


def over_seeds(x):
    """Mean and half its 95% interval, each (...,), of x (..., S, n); S and n are 2 at least."""
    by_seed, question, _ = components(x)
    return x.mean(axis=(-2, -1)), half_width(by_seed, question, *x.shape[-2:])


def needed(x, effect: float = EFFECT) -> tuple[int | None, int | None]:
    """Seeds needed on these questions, and questions needed with these seeds, to see an effect.

    Args: x (S, n), which gives the variances. "To see" is to get a 95% interval without 0, 4 times out of 5.
    Returns None for more than 200 seeds or a million questions: the other of the two then limits alone; and
    twice None where x does not vary, from which nothing can be guessed.
    """
    if np.ptp(x) == 0:
        return None, None
    by_seed, question, rest = components(x)
    seed = np.maximum(by_seed - rest / x.shape[1], 0)

    def first_enough(S, n, counts):
        part = seed + rest / n
        error = np.sqrt(part / S + question / n)
        enough = half_width(part, question, S, n) + NormalDist().inv_cdf(POWER) * error <= effect
        return int(counts[enough.argmax()]) if enough.any() else None

    seeds = np.arange(2, 201)
    questions = np.unique(np.round(10 ** np.linspace(1, 6, 201), -1).astype(int))
    return first_enough(seeds, x.shape[1], seeds), first_enough(x.shape[0], questions, questions)


# ---- within a seed -----------------------------------------------------------------------------------------

def bootstrap_interval(x, repeats: int = 2000):
    """Paired bootstrap: low and high, (...,), of the 95% interval of the mean over n examples of x (n, ...).

    Percentiles, at levels widened to make the interval as wide as Student's for n values (Hesterberg 2015).
    """
    n = len(x)
    counts = draw_counts(np.random.default_rng(0), n, n, repeats)
    edge = NormalDist().cdf(-math.sqrt(n / (n - 1)) * float(t_quantile(0.95, n - 1)))
    return np.quantile(np.tensordot(counts, x, axes=1) / n, [edge, 1 - edge], axis=0)


def draw_counts(random: np.random.Generator, n: int, draws: int, repeats: int):
    """How often each of n examples is among `draws` drawn with replacement: (R, n)."""
    drawn = random.integers(n, size=(repeats, draws)) + n * np.arange(repeats)[:, None]
    return np.bincount(drawn.ravel(), minlength=repeats * n).reshape(repeats, n).astype(float)


@functools.lru_cache(maxsize=2)    # a report asks for the same ones again and again
def sign_patterns(n: int, repeats: int):
    """All 2^n sign patterns of n values where n <= 12, else as they are and `repeats` random ones: (R, n)."""
    if n <= EXACT_FLIPS:
        return 1.0 - 2 * (np.arange(2 ** n)[:, None] >> np.arange(n) & 1)
    signs = np.ones((1 + repeats, n))
    signs[1:] -= 2 * np.random.default_rng(0).integers(0, 2, (repeats, n))
    return signs


def sign_flip_p(x, repeats: int = 9999):
    """Two-sided p-values, (...,), that the n values of x (n, ...) are symmetric about 0: the share of sign
    patterns whose sum is as far from 0 as the observed one. Exact where n <= 12, else from a random sample of
    patterns."""
    signs = sign_patterns(len(x), repeats)
    ties = 1e-9 * np.abs(x).sum(axis=0)    # equal sums may differ in their last bits
    return (np.abs(np.tensordot(signs, x, axes=1)) >= np.abs(x.sum(axis=0)) - ties).mean(axis=0)


# ---- the log's protocol ------------------------------------------------------------------------------------

def log_protocol(accuracy, draws: int, same_draws: bool, repeats: int = 1000):
    """d_acc as the log would have measured it, again and again: (R, S).

    Args: accuracy (S, 2, K, n), of both arms at every evaluation; draws, the answers that the log drew with
        replacement for one evaluation; same_draws: the k-th evaluation of every run draws the same answers
        (the log's trainers seed the draws alike), else each run draws its own. Each arm counts with its best
        evaluation, as in the log.
    """
    S, _, K, n = accuracy.shape
    random = np.random.default_rng(0)
    best = np.full((repeats, S, 2), -np.inf)
    for k in range(K):
        counts = draw_counts(random, n, draws, repeats)
        means = counts @ accuracy[:, :, k].reshape(2 * S, n).T / draws    # (R, 2 S)
        if not same_draws:
            # every column takes another repeat's draws: independent, at the price of one product
            means = np.stack([np.roll(means[:, column], column) for column in range(2 * S)], axis=1)
        best = np.maximum(best, means.reshape(repeats, S, 2))
    return best[:, :, 1] - best[:, :, 0]


def noise_floor(accuracy, draws: int, log_seeds: int) -> dict:
    """What the choice of validation answers alone does to d_acc, from accuracy (S, 2, K, n) alone.

    Returns: standard deviations of one seed's d_acc, "log" under the log's protocol with draws of their own
        for the two arms, "log_same" with the same draws, "ours" on the whole set, paired, at the last
        evaluation; "spread" and "spread_same", the population standard deviation over log_seeds seeds to be
        expected if nothing else set them apart (spread_same is None with one seed: it takes two to differ).
    """
    last = accuracy[:, 1, -1] - accuracy[:, 0, -1]    # (S, n)
    shrink = (log_seeds - 1) / log_seeds              # a population variance, as the log's
    floor = {"ours": float(np.sqrt(last.var(axis=1, ddof=1).mean() / last.shape[1]))}
    for same in (False, True):
        d_acc = log_protocol(accuracy, draws, same)
        centred = d_acc - d_acc.mean(axis=0)          # whatever truly sets the seeds apart is taken out
        variance = centred.var(axis=0).mean()
        between = variance
        if same:
            between = centred.var(axis=1, ddof=1).mean() if len(accuracy) > 1 else None
        suffix = "_same" if same else ""
        floor[f"log{suffix}"] = float(math.sqrt(variance))
        floor[f"spread{suffix}"] = None if between is None else float(math.sqrt(between * shrink))
    return floor
