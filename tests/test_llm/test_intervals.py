"""Confidence intervals: published values, coverage by simulation, and the ends of the range."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eggroll.llm.measure import intervals
from eggroll.llm.measure.intervals import FEW, mcnemar, mean_interval, paired_proportions, wilson


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(count, total, low, high):
    found = wilson(count, total)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(
    ("both", "gained", "lost", "neither", "low", "high"),
    # the examples of Newcombe 1998, Statistics in Medicine 17:2635
    [(36, 12, 2, 0, 0.0569, 0.3404), (20, 12, 2, 16, 0.0562, 0.3292), (54, 0, 0, 0, -0.0664, 0.0664)],
)
def test_newcombe(both, gained, lost, neither, low, high):
    before = np.array([True] * both + [False] * gained + [True] * lost + [False] * neither)
    after = np.array([True] * (both + gained) + [False] * (lost + neither))
    found = paired_proportions(before, after)
    assert found.value == pytest.approx((gained - lost) / len(before))
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    swapped = paired_proportions(after, before)
    assert (swapped.low, swapped.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_mcnemar():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(1, 6) == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(6, 1) == mcnemar(1, 6)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=40))
def test_a_mean_lies_in_its_interval_and_the_interval_in_the_range(tenths):
    scores = np.array(tenths) / 10
    found = mean_interval(scores, 0.0, 1.1, seed=0)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.1
    assert found.value == pytest.approx(scores.mean())
    if len(set(tenths)) > 1:
        assert found.method == ("bootstrap (BCa)" if len(tenths) >= FEW else "Wilson, of the range")
    else:
        assert found.high - found.low > 0.02  # never certain


def test_wilson_is_scipys_for_whole_counts():
    for count, total in ((0, 1), (1, 4), (3, 10), (81, 263), (128, 128)):
        theirs = stats.binomtest(count, total).proportion_ci(method="wilson")
        assert (wilson(count, total).low, wilson(count, total).high) == pytest.approx((theirs.low, theirs.high))


def test_the_wider_of_bootstrap_and_t():
    scores = np.random.default_rng(0).gamma(1, size=60)
    half = stats.t.ppf(0.975, 59) * scores.std(ddof=1) / 60**0.5
    found = mean_interval(scores, 0.0, 99.0, seed=1)
    assert found.low == pytest.approx(scores.mean() - half)  # skewed to the right, so BCa's bounds are higher
    assert found.high > scores.mean() + half
    assert found == mean_interval(scores, 0.0, 99.0, seed=1)
    assert found.high != mean_interval(scores, 0.0, 99.0, seed=2).high


@pytest.mark.parametrize("count", [4, 8, 15, 16, 24])
def test_equal_models_are_rarely_called_different(count, monkeypatch):
    """Differences of 0 on average, of few problems: the interval leaves 0 out in at most about 5 % of 300 pairs.

    Four standard deviations of a proportion of 0.05 are 0.05. A bootstrap alone does so in 13 to 20 %.
    """
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    rng = np.random.default_rng(count)
    chances = [0.15, 0.1, 0.5, 0.1, 0.15]
    pairs = [rng.choice([-1.0, -0.05, 0.0, 0.05, 1.0], count, p=chances) for _ in range(300)]
    found = [mean_interval(pair, -1.1, 1.1, seed=1) for pair in pairs]
    assert np.mean([each.low > 0 or each.high < 0 for each in found]) < 0.1


def test_equal_scores():
    found = mean_interval(np.zeros(128), 0.0, 1.0, seed=0)
    assert (found.low, found.high) == (0.0, pytest.approx(wilson(0, 128).high))
    assert mean_interval(np.zeros(128), -1.0, 1.0, seed=0).low == pytest.approx(-wilson(0, 128).high)


def test_coverage(monkeypatch):
    """Format rewards with some right answers: 95 % intervals hold the truth about 95 % of the time.

    150 experiments; four standard deviations of a proportion of 0.95 are 0.071, and BCa at n = 100 is known to be low
    by one or two hundredths for skewed scores.
    """
    monkeypatch.setattr(intervals, "RESAMPLES", 2000)
    rng = np.random.default_rng(0)
    values, weights = np.array([0.0, 0.05, 0.1, 1.1]), np.array([0.3, 0.3, 0.2, 0.2])
    truth = float(values @ weights)
    hits = 0
    for _ in range(150):
        found = mean_interval(rng.choice(values, 100, p=weights), 0.0, 1.1, seed=1)
        hits += found.low <= truth <= found.high
    assert 0.86 <= hits / 150 <= 1


def test_paired_coverage():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        before = rng.random(100) < 0.3
        after = np.where(before, rng.random(100) < 0.9, rng.random(100) < 0.15)
        found = paired_proportions(before, after)
        hits += found.low <= 0.3 * 0.9 + 0.7 * 0.15 - 0.3 <= found.high
    assert 0.887 <= hits / 300 <= 1
