"""The statistics: is the ruler right on experiments whose truth is known, and are the exact tests exact?

The simulated laws of seeds are in simulate_ruler.py, whose docstring has the whole table.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import stats
from simulate_ruler import LOPSIDED, SYMMETRIC, intervals, seen, wrong, wrongly_no_effect

NO_EFFECT = "no effect larger than 0.02"


@st.composite
def experiments(draw, least=6):
    """Differences (S, n) of answers that are right, wrong, or a third right."""
    shape = draw(st.integers(least, 12)), draw(st.integers(2, 40))
    values = st.sampled_from([-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1])
    return draw(arrays(float, shape, elements=values, fill=values))


# ---- the verdict -------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(experiments(), st.randoms(use_true_random=False), st.floats(-0.5, 0.5))
def test_interval_has_its_symmetries(x, random, effect):
    """Catches a rank counted from the wrong end, a sum over the wrong axis, and an end widened inwards: the
    order of seeds and of questions is nothing, exchanged arms mirror the interval, an effect that is the same
    everywhere moves it, and it holds the observed median."""
    verdict, low, high = stats.judge(x)
    shuffled = x[random.sample(range(len(x)), len(x))][:, random.sample(range(x.shape[1]), x.shape[1])]
    assert np.allclose(stats.judge(shuffled)[1:], (low, high), rtol=0, atol=1e-12)
    mirrored = {"positive": "negative", "negative": "positive"}.get(verdict, verdict)
    assert stats.judge(-x) == (mirrored, -high, -low)
    assert np.allclose(stats.judge(x + effect)[1:], (low + effect, high + effect), rtol=0, atol=1e-12)
    assert low <= np.median(x.mean(axis=1)) <= high


def test_interval_by_hand():
    """Catches a variance with the wrong divisor, and the third seed in the place of the second: ten seeds,
    four questions, every sum written out."""
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 0, 1], size=(10, 4))
    by_seed = [sum(row) / 4 for row in x]
    by_question = [sum(column) / 10 for column in x.T]
    mean = sum(by_seed) / 10
    ms_question = 10 * sum((q - mean) ** 2 for q in by_question) / 3
    cells = itertools.product(range(10), range(4))
    ms_rest = sum((x[s, i] - by_seed[s] - by_question[i] + mean) ** 2 for s, i in cells) / 27
    assert ms_question > ms_rest
    shift = 1.96 * math.sqrt(((ms_question - ms_rest) / 10 + 2 / 4) / 4)
    _, low, high = stats.judge(x)
    assert np.allclose((low, high), (sorted(by_seed)[1] - shift, sorted(by_seed)[8] + shift), atol=1e-12)


@pytest.mark.parametrize("S", range(1, 13))
def test_ranks_by_counting_all_draws(S):
    """Catches a rank that is one too large or too small: seeds above and below the median are S fair coins,
    and of all 2^S throws at most 5% may leave the median outside, with the tightest ranks that do so."""
    above = [sum(throw) for throw in itertools.product((0, 1), repeat=S)]

    def outside(rank):
        return sum(heads < rank or S - heads < rank for heads in above) / 2 ** S

    rank = stats.median_rank(S)
    assert (rank == 0 or outside(rank) <= 0.05) and outside(rank + 1) > 0.05
    assert (rank > 0) == (S >= stats.MIN_SEEDS)
    if S == 10:
        assert rank == 2 and round(100 * (1 - outside(rank)), 1) == 97.9


def test_verdict_follows_the_rule():
    """Catches a rule that drifts from its words: a common effect is moved through all verdicts, and each
    must say where the interval lies."""
    x = np.random.default_rng(1).choice([0.0, 1, -1], p=[0.98, 0.01, 0.01], size=(20, 4000))
    found = []
    for effect in np.linspace(-0.04, 0.04, 41):
        verdict, low, high = stats.judge(x + effect)
        assert (verdict == "positive") == (low > 0)
        assert (verdict == "negative") == (high < 0)
        assert (verdict == NO_EFFECT) == (-0.02 < low <= 0 <= high < 0.02)
        found.append(verdict)
    assert list(dict.fromkeys(found)) == ["negative", NO_EFFECT, "positive"]
    assert all(f"{verdict}:" in stats.RULE for verdict in {*found, "inconclusive"})
    for ends in ((-0.03, 0.03), (-0.03, 0.0), (0.0, 0.03)):    # an end outside is enough
        assert stats.judge(np.zeros((20, 4000)) + np.resize(ends, (20, 1)))[0] == "inconclusive"


def test_too_little_decides_nothing():
    """Catches a verdict, a warning or a crash where nothing can be known: few seeds, one question, and NaN,
    which is never an effect."""
    for S, n in ((1, 1), (1, 500), (5, 500), (20, 1)):
        assert stats.judge(np.ones((S, n))) == ("inconclusive", -math.inf, math.inf)
    assert stats.judge(np.ones((6, 500)))[0] == "positive"
    x = np.ones((6, 500))
    x[0, 0] = math.nan
    assert stats.judge(x)[0] == "inconclusive"


def test_arms_that_answer_alike():
    """Catches an interval without width: a control that never moves shows no effect if 512 or 200 questions
    say so, and shows nothing if 40 do."""
    for n, verdict in ((512, NO_EFFECT), (200, NO_EFFECT), (40, "inconclusive")):
        assert stats.judge(np.zeros((10, n)))[0] == verdict


def test_few_questions_that_move_alike_are_no_effect():
    """Catches var(question) without its 2 / n: k questions moved alike in all seeds, each up or down by a
    fair coin. Five of five up is no effect yet, and a wrong "positive" stays near 2.5% for every k."""
    def positive(ups, k):
        x = np.zeros((10, 512))
        x[:, :ups] = 1
        x[:, ups:k] = -1
        return stats.judge(x)[0] == "positive"

    assert not positive(5, 5) and positive(6, 6)
    for k in range(1, 41):
        assert sum(math.comb(k, ups) for ups in range(k + 1) if positive(ups, k)) / 2 ** k <= 0.032


# ---- simulated ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("S", [6, 20])
@pytest.mark.parametrize("noise", [(0.4, 0.3), (0.05, 0.45)])
def test_wrong_verdicts_are_rare(S, noise):
    """Catches an interval that forgets seeds, or questions: the simulation's table, a small part of it."""
    E = 400
    rare = 0.025 + 3 * math.sqrt(0.025 / E)
    for name, ends in intervals(SYMMETRIC | LOPSIDED, S, 200, noise, E).items():
        # the noise of 200 questions makes gains of seeds that do not move, next to four in ten that jump
        assert wrong(ends) <= (0.2 if name == "+0.45, four in ten" else rare), name
        assert wrongly_no_effect(ends) <= rare, name
        assert seen(ends, 0.7) >= 0.95, name


def test_the_measured_median_is_covered_for_lopsided_seeds_too():
    """Backs stats.py on what is claimed of one-sided jumps: the median of differences as n questions measure
    them. It is found here from many seeds, and is above the seeds' own median of 0."""
    rng = np.random.default_rng(3)
    n, rest, E = 200, 0.45, 600
    for name in ("+0.45, four in ten", "as R6"):
        many = LOPSIDED[name](rng, 400_000) + rng.normal(0, rest / math.sqrt(n), 400_000)
        truth = np.median(many)
        low, high = intervals({name: LOPSIDED[name]}, 10, n, (0.05, rest), E)[name].T
        assert 0 < truth < rest / math.sqrt(n)
        assert max((low > truth).mean(), (high < truth).mean()) <= 0.025 + 3 * math.sqrt(0.025 / E)


def test_why_not_the_usual_intervals():
    """Backs the claims of stats.py. One seed in ten jumps: Student's interval ends below the mean in a fifth
    of all cases. Seeds alike, questions not: order statistics alone take the shared shift for an effect. Half
    of the seeds jump: ends in quadrature call that a gain of the typical seed."""
    rng = np.random.default_rng(4)
    E, S, n = 600, 10, 200
    deltas = rng.choice([0, 0.45], (E, S), p=[0.9, 0.1]) + rng.normal(0, 0.02, (E, S))
    half = 2.262 * deltas.std(axis=1, ddof=1) / math.sqrt(S)
    assert (deltas.mean(axis=1) + half < 0.045).mean() > 0.2
    alone = quadrature = 0
    for _ in range(E):
        x = rng.normal(0, 0.4, n) + rng.normal(0, 0.3, (S, n))
        alone += np.sort(x.mean(axis=1))[1] > 0
        jumping = x + rng.choice([0, 0.45], (S, 1))
        deltas = np.sort(jumping.mean(axis=1))
        shift = deltas[1] - stats.judge(jumping)[1]
        middle = np.median(deltas)
        quadrature += middle - math.hypot(middle - deltas[1], shift) > 0
    assert alone / E > 0.1
    assert quadrature / E > 0.15


def test_answers_made_of_tokens():
    """Catches an interval that holds for bell curves only: answers of one to six tokens, mostly wrong in both
    arms, on questions that Future-Seed helps or hurts, in seeds half of which gain what the others lose."""
    rng = np.random.default_rng(5)
    E, S, n = 600, 10, 200
    ends = np.empty((E, 2))
    for e in range(E):
        difficulty = rng.beta(1, 2, n) * 0.6 + 0.2
        effect = rng.uniform(-0.1, 0.1, n) + rng.choice([-0.1, 0.1], (S, 1))
        tokens = rng.integers(1, 7, n)
        with_fs = rng.binomial(tokens, difficulty + effect) / tokens
        without = rng.binomial(tokens, difficulty, (S, n)) / tokens
        ends[e] = stats.judge(with_fs - without)[1:]
    assert wrong(ends) <= 0.025 + 3 * math.sqrt(0.025 / E)
    assert seen(ends, 0.3) > 0.95


# ---- counts of seeds ---------------------------------------------------------------------------------------

def test_signs_and_their_test_by_counting_all_patterns():
    """Catches a one-sided p, the middle counted twice, and 1e-17 or 0 taken for a gain."""
    assert stats.signs([0.1, 0.2, 1e-17, -0.3, 0.0, 0.5]) == "3/2/1"
    for S in range(1, 9):
        patterns = list(itertools.product((1, -1), repeat=S))
        for pattern in patterns:
            expected = sum(abs(sum(other)) >= abs(sum(pattern)) for other in patterns) / 2 ** S
            assert math.isclose(stats.sign_test([*pattern, 0.0, -1e-17]), expected)
    assert stats.sign_test([0.0, 0.0]) == 1
    assert stats.sign_test(np.ones(10)) == 2 / 1024


def test_mcnemar_by_exchanging_the_arms():
    """Catches arms compared as if their seeds were others: of all ways to exchange the arms of each seed, how
    many set the arms as far apart as they are?"""
    jumps = list(itertools.product((False, True), repeat=5))
    for without, with_fs in itertools.product(jumps[::3], jumps):
        change = np.subtract(with_fs, without, dtype=float)
        exchanged = np.array(list(itertools.product((1, -1), repeat=5))) @ change
        expected = (abs(exchanged) >= abs(change.sum())).mean()
        assert math.isclose(stats.mcnemar(without, with_fs), expected)
    # seven jumps against five: two seeds that changed, or eight that did
    assert stats.mcnemar([1] * 5 + [0] * 5, [1] * 7 + [0] * 3) == 0.5
    assert math.isclose(stats.mcnemar([1] * 5 + [0] * 5, [0] * 3 + [1] * 7), 1 - 70 / 2 ** 8)


@pytest.mark.parametrize("gains, seeds, low, high", [
    (0, 10, 0, 0.3084971), (1, 10, 0.0025286, 0.4450161), (5, 10, 0.1870860, 0.8129140),
    (9, 10, 0.5549839, 0.9974714), (10, 10, 0.6915029, 1), (19, 20, 0.7512671, 0.9987349), (1, 1, 0.025, 1),
])
def test_chance_to_gain_has_its_known_values(gains, seeds, low, high):
    """Catches ends exchanged, or at 5% a side; seeds that stay are seeds that do not gain."""
    deltas = [0.1] * gains + [0.0, -0.2] * seeds
    assert np.allclose(stats.chance_to_gain(deltas[:seeds]), (gains / seeds, low, high), atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.001, 0.01, 0.01, 0.02, 0.03, 0.04, 0.3, 1.0]), min_size=1, max_size=6))
def test_holm_by_brute_force(p_values):
    """Catches a step that starts at the wrong end, and p-values handed back in another order: a hypothesis
    falls if every set of hypotheses that it is in falls by Bonferroni."""
    m = len(p_values)
    sets = [chosen for size in range(1, m + 1) for chosen in itertools.combinations(range(m), size)]
    for i, corrected in enumerate(stats.holm(p_values)):
        worst = max(len(chosen) * min(p_values[j] for j in chosen) for chosen in sets if i in chosen)
        assert math.isclose(corrected, min(worst, 1))
