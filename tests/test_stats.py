"""The statistics: do intervals cover, are p-values uniform, is the log's noise what its protocol makes it?

Each is measured by simulating thousands of experiments whose truth is known, all at once in numpy.
"""

import itertools
import math
import random

import numpy as np
import pytest

import stats


def crossed(rng, R, S, n, seed, question, rest, mean=0.0):
    """R experiments (R, S, n) with these standard deviations of seed, question and rest."""
    x = rng.normal(0, rest, (R, S, n))
    x += rng.normal(0, seed, (R, S, 1))
    x += rng.normal(mean, question, (R, 1, n)) if question else mean
    return x


# ---- Student's t -------------------------------------------------------------------------------------------

def test_students_t_has_its_known_values():
    """Catches a wrong t: every interval would be too short or too long by the same factor."""
    for df, expected in ((1, 12.706204736432095), (2, 4.302652729911275), (10, 2.2281388519649385),
                         (30, 2.0422724563012373), (499, 1.9647293909876649)):
        assert abs(stats.t_quantile(0.95, df) - expected) < 1e-7
    t = np.array([0.0, 0.3, 1.0, 4.0, 50.0])
    assert np.abs(stats.t_central(t, 1) - 2 / math.pi * np.arctan(t)).max() < 1e-10
    assert np.abs(stats.t_central(t, 2) - t / np.sqrt(2 + t ** 2)).max() < 1e-10
    normal = [math.erf(value / math.sqrt(2)) for value in t]
    assert np.abs(stats.t_central(t, 1e8) - normal).max() < 1e-7


def test_quantile_inverts_the_probability_at_every_df():
    """Catches a Newton iteration that has not converged, for whole and for fractional degrees of freedom."""
    df = np.array([1, 1.01, 1.5, 2, 3.3, 12, 200, 1e4])
    assert np.abs(stats.t_central(stats.t_quantile(0.95, df), df) - 0.95).max() < 1e-9


def test_t_test_of_the_logs_best_round():
    """Catches a t-test with the population's instead of the sample's deviation: R2 is t = 2.33, p = 0.14."""
    mean, half, p = stats.t_test([2 / 128, 3 / 128, 8 / 128])
    assert abs(mean - 0.0338542) < 1e-6
    assert abs(p - 0.1448) < 5e-4
    assert mean - half < 0 < mean + half
    assert stats.t_test([0.0, 0.0]) == (0.0, 0.0, 1.0)


# ---- coverage ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed, question, rest", [
    (0.00, 0.0, 0.3),     # seeds and questions are all alike
    (0.02, 0.0, 0.3),     # seeds differ
    (0.10, 0.1, 0.3),     # seeds differ much more than questions can tell
    (0.00, 0.1, 0.3),     # the arms differ by question, the seeds do not
    (0.02, 0.2, 0.3),     # both, about equal
    (0.08, 0.1, 0.1),     # the worst mixture for a single t (Satterthwaite): it covers 92.4% of 3 seeds
    (0.01, 0.6, 0.1),     # questions are almost all there is
])
@pytest.mark.parametrize("S", [3, 5, 10])
def test_interval_over_seeds_covers(S, seed, question, rest):
    """Catches an interval that forgets seeds, or questions, or that few seeds tell little of their spread."""
    rng = np.random.default_rng(S)
    covered, R, n = 0, 0, 60
    for _ in range(36 // S):
        mean, half = stats.over_seeds(crossed(rng, 1000, S, n, seed, question, rest, mean=0.03))
        covered += (np.abs(mean - 0.03) <= half).sum()
        R += len(mean)
    assert R >= 2000
    assert 0.93 <= covered / R <= 0.97, covered / R


def test_interval_over_two_seeds_is_near():
    """Catches a division by zero, or nonsense, at the smallest number of seeds."""
    rng = np.random.default_rng(0)
    for question in (0.0, 0.2):
        mean, half = stats.over_seeds(crossed(rng, 4000, 2, 60, 0.02, question, 0.3))
        assert 0.92 <= (np.abs(mean) <= half).mean() <= 0.985


def token_answers(rng, R, S, n, tokens, effect):
    """Accuracies of two arms (R, S, 2, n) that find the same questions hard."""
    difficulty = rng.beta(0.6, 2.5, (R, 1, 1, n)) * 0.8
    helped = effect + rng.normal(0, 0.05, (R, 1, 1, n)) + rng.normal(0, 0.01, (R, S, 1, 1))
    with_fs = np.clip(difficulty + np.clip(helped, -0.1, 0.2), 0, 1)
    length = rng.integers(1, tokens + 1, (R, 1, 1, n))
    share = np.concatenate(np.broadcast_arrays(difficulty, with_fs), axis=2)
    return rng.binomial(length, np.broadcast_to(share, (R, S, 2, n))) / length


@pytest.mark.parametrize("tokens", [1, 6])
def test_intervals_cover_on_answers_made_of_tokens(tokens):
    """Catches an interval that holds for bell curves only: these answers are right, wrong, or a third right,
    and mostly wrong in both arms."""
    truth_rng = np.random.default_rng(9)
    truth = np.diff(token_answers(truth_rng, 400, 20, 200, tokens, 0.04).mean(axis=(0, 1, 3)))[0]
    rng = np.random.default_rng(1)
    accuracy = np.concatenate([token_answers(rng, 500, 3, 100, tokens, 0.04) for _ in range(6)])
    x = accuracy[:, :, 1] - accuracy[:, :, 0]    # (R, S, n)
    mean, half = stats.over_seeds(x)
    assert 0.93 <= (np.abs(mean - truth) <= half).mean() <= 0.97


@pytest.mark.parametrize("name, n", [("normal", 20), ("sparse", 200), ("thirds", 60)])
def test_bootstrap_within_a_seed_covers(name, n):
    """Catches percentiles that are too narrow for few examples, and resampling that breaks the pairs."""
    rng = np.random.default_rng(3)
    R = 4000
    if name == "normal":
        x, truth = rng.normal(0.1, 1, (n, R)), 0.1
    elif name == "sparse":    # ARC: the arms differ on one question in five
        x, truth = rng.choice([-1.0, 0, 1], p=[0.08, 0.8, 0.12], size=(n, R)), 0.04
    else:
        x = rng.choice([-2 / 3, -1 / 3, 0, 1 / 3, 1], p=[0.05, 0.15, 0.5, 0.2, 0.1], size=(n, R))
        truth = 0.25 / 3
    low, high = stats.bootstrap_interval(x)
    assert 0.93 <= ((low <= truth) & (truth <= high)).mean() <= 0.97


def test_why_not_the_usual_intervals():
    """Backs the claim of stats.py: percentiles of a hierarchical bootstrap from 3 seeds, and a t interval
    over the seeds' means where questions matter, cover far less than 95%."""
    rng = np.random.default_rng(4)
    x = crossed(rng, 300, 3, 60, 0.3, 0.1, 0.3)
    covered = 0
    for experiment in x:
        seeds = rng.integers(3, size=(400, 3))
        questions = stats.draw_counts(rng, 60, 60, 400) / 60
        means = (experiment[seeds].mean(axis=1) * questions).sum(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered += low <= 0 <= high
    assert covered / len(x) < 0.84
    by_seed = crossed(rng, 4000, 5, 60, 0.0, 0.2, 0.3).mean(axis=2)
    half = stats.t_quantile(0.95, 4) * by_seed.std(axis=1, ddof=1) / math.sqrt(5)
    assert (np.abs(by_seed.mean(axis=1)) <= half).mean() < 0.88


def test_no_difference_at_all_is_not_an_error():
    """Catches 0/0: two arms that agree on everything, as alpha -> -inf makes them."""
    mean, half = stats.over_seeds(np.zeros((3, 20)))
    assert mean == 0 and half == 0
    low, high = stats.bootstrap_interval(np.zeros((20, 2)))
    assert (low == 0).all() and (high == 0).all()
    assert (stats.sign_flip_p(np.zeros((20, 2))) == 1).all()
    assert stats.needed(np.zeros((3, 20))) == (None, None)
    assert stats.verdict(0.0, 0.0, 3) == "inconclusive"
    assert stats.verdict(1.0, 1.0, 3) == "positive"    # every answer of every seed


# ---- p-values ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [5, 8, 40])
def test_p_values_are_uniform_without_an_effect(n):
    """Catches a one-sided p, or one that counts the observed pattern twice or not at all."""
    rng = np.random.default_rng(n)
    p = stats.sign_flip_p(rng.normal(size=(n, 3000)), repeats=1999)
    levels = [k / 2 ** (n - 1) for k in (1, 2, 4, 8)] if n <= 12 else [0.01, 0.05, 0.2, 0.5, 0.9]
    for level in levels:
        share = (p <= level + 1e-9).mean()
        assert abs(share - level) <= 3.5 * math.sqrt(level * (1 - level) / len(p)), (level, share)
    assert p.min() > 0


def test_exact_p_by_brute_force():
    """Catches a lost sign pattern, and ties broken by rounding: 0.1 + 0.2 is not 0.3."""
    for values in ([0.1, 0.2, -0.3], [0.0156, 0.0234, 0.0625], [0.7, 0.3, 0, -0.4, -0.4],
                   [0.1, -0.8, -0.4, 0, -0.1]):
        flips = [abs(sum(s * v for s, v in zip(pattern, values)))
                 for pattern in itertools.product((1, -1), repeat=len(values))]
        expected = np.mean([flip >= abs(sum(values)) - 1e-12 for flip in flips])
        assert stats.sign_flip_p(np.array(values)) == expected
    assert stats.sign_flip_p(np.array([0.0156, 0.0234, 0.0625])) == 0.25    # three seeds cannot say more


def test_random_flips_agree_with_all_flips():
    """Catches random patterns that are not fair coins: 13 values are sampled, but 8192 can be counted."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1, 13)
    patterns = np.array(list(itertools.product((1, -1), repeat=13)))
    exact = (np.abs(patterns @ x) >= abs(x.sum()) - 1e-12).mean()
    assert abs(stats.sign_flip_p(x) - exact) < 4 * math.sqrt(exact * (1 - exact) / 9999)
    assert stats.sign_flip_p(np.ones(60)) == 1 / 10000    # the observed pattern always counts


# ---- verdict and power -------------------------------------------------------------------------------------

def test_verdict_follows_the_rule():
    """Catches a rule that drifts from the words in which it was fixed."""
    assert stats.verdict(0.001, 0.05, 3) == "positive"
    assert stats.verdict(-0.05, -0.001, 3) == "negative"
    assert stats.verdict(-0.019, 0.019, 3) == "no effect larger than 0.02"
    assert stats.verdict(-0.021, 0.019, 3) == "inconclusive"
    assert stats.verdict(-0.01, 0.02, 3) == "inconclusive"
    assert stats.verdict(0.01, 0.05, 1) == "inconclusive"


def test_needed_numbers_give_the_promised_power():
    """Catches a power formula that forgets a part of the variance: it would promise what cannot be seen."""
    rng = np.random.default_rng(5)
    parts = dict(seed=0.01, question=0.08, rest=0.25)
    seeds, questions = stats.needed(crossed(rng, 1, 100, 400, **parts)[0])
    mean, half = stats.over_seeds(crossed(rng, 2000, seeds, 400, **parts, mean=stats.EFFECT))
    assert 0.72 <= (mean - half > 0).mean() <= 0.9
    _, questions = stats.needed(crossed(rng, 1, 10, 4000, **parts)[0])
    mean, half = stats.over_seeds(crossed(rng, 600, 10, questions, **parts, mean=stats.EFFECT))
    assert 0.7 <= (mean - half > 0).mean() <= 0.9
    assert stats.needed(crossed(rng, 1, 3, 400, 0.2, 0.0, 0.1)[0]) == (None, None)


# ---- the log's protocol ------------------------------------------------------------------------------------

def arms(rng, S, K, n):
    """Two arms' accuracies (S, 2, K, n), alike on the same question, rising from evaluation to evaluation."""
    difficulty = rng.beta(0.5, 3, (1, 1, 1, n))
    noise = rng.normal(0, 0.08, (S, 2, K, n))
    return np.clip(difficulty + noise + 0.01 * np.arange(K)[:, None], 0, 1)


def test_noise_floor_in_closed_form():
    """Catches a wrong count of draws, or an arm left out: with one evaluation the variance is known."""
    accuracy = arms(np.random.default_rng(6), 3, 1, 200)
    floor = stats.noise_floor(accuracy, draws=16, log_seeds=3)
    separate = accuracy.var(axis=3).sum(axis=1).mean() / 16
    difference = accuracy[:, 1, 0] - accuracy[:, 0, 0]    # (S, n)
    assert abs(floor["log"] / math.sqrt(separate) - 1) < 0.04
    assert abs(floor["log_same"] / math.sqrt(difference.var(axis=1).mean() / 16) - 1) < 0.06
    assert abs(floor["ours"] / math.sqrt(difference.var(axis=1, ddof=1).mean() / 200) - 1) < 1e-9
    assert abs(floor["spread"] / math.sqrt(separate * 2 / 3) - 1) < 0.04
    # seeds that draw the same answers share what these answers do to all seeds, which makes no spread
    shared = np.cov(difference, ddof=0)
    between = np.trace(shared) / 3 - (shared.sum() - np.trace(shared)) / 6
    assert abs(floor["spread_same"] / math.sqrt(between / 16 * 2 / 3) - 1) < 0.06


def the_log(accuracy, draws, generator_of):
    """The log's protocol, word for word: every run evaluates K times, each time on `draws` examples drawn
    with replacement, and counts with its best evaluation."""
    S, _, K, n = accuracy.shape
    d_acc = []
    for s in range(S):
        best = []
        for arm in range(2):
            generator = generator_of(s, arm)
            evaluations = []
            for k in range(K):
                chosen = [generator.randrange(n) for _ in range(draws)]
                evaluations.append(accuracy[s, arm, k, chosen].mean())
            best.append(max(evaluations))
        d_acc.append(best[1] - best[0])
    return d_acc


@pytest.mark.parametrize("same_draws", [False, True])
def test_the_logs_protocol_simulated_word_for_word(same_draws):
    """Backs the report's sentence on the log's spread: with three seeds that truly are the same, the spread
    that the log's protocol shows is the one that noise_floor expects."""
    accuracy = np.repeat(arms(np.random.default_rng(7), 1, 4, 200), 3, axis=0)
    rng = np.random.default_rng(8)
    accuracy = np.clip(accuracy + rng.permuted(rng.normal(0, 0.1, accuracy.shape), axis=3), 0, 1)
    accuracy -= accuracy.mean(axis=3, keepdims=True) - accuracy.mean()     # equal truths: only draws differ
    d_acc = []
    for repeat in range(700):
        def generator_of(s, arm):
            return random.Random(1000 * repeat + (0 if same_draws else 2 * s + arm))

        d_acc.append(the_log(accuracy, 16, generator_of))
    d_acc = np.array(d_acc)    # (700, S)
    floor = stats.noise_floor(accuracy, draws=16, log_seeds=3)
    suffix = "_same" if same_draws else ""
    assert abs(d_acc.std(axis=0).mean() / floor[f"log{suffix}"] - 1) < 0.07
    # the seeds' means under this protocol still differ a little, best of 4 favours the noisier arm
    spread = math.sqrt((d_acc - d_acc.mean(axis=0)).var(axis=1).mean())
    assert abs(spread / floor[f"spread{suffix}"] - 1) < 0.07


def test_the_whole_set_is_a_better_ruler():
    """The point of the project's protocol: on the same answers, less than a third of the log's noise."""
    floor = stats.noise_floor(arms(np.random.default_rng(10), 3, 5, 200), draws=16, log_seeds=3)
    assert floor["ours"] < floor["log"] / 3
