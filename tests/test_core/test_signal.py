"""Variance components of scores with known spread and noise."""

import itertools
import math

import numpy as np
import pytest

from eggroll.core.signal import Components


def table(spread, noise, *, pairs=16, prompts=8, antithetic=True, seed=0, even=0.0):
    """Scores of members whose true scores differ by ``spread``, with ``noise`` and prompts of unlike difficulty."""
    rng = np.random.default_rng(seed)
    base = 5 * rng.normal(size=prompts)
    if not antithetic:
        return base + spread * rng.normal(size=(2 * pairs, 1)) + noise * rng.normal(size=(2 * pairs, prompts))
    odd = spread * rng.normal(size=(pairs, 1, 1)) * np.array([1.0, -1.0]).reshape(1, 2, 1)
    both = even * rng.normal(size=(pairs, 1, 1))  # what both members of a pair have in common teaches nothing
    return (base + odd + both + noise * rng.normal(size=(pairs, 2, prompts))).reshape(2 * pairs, prompts)


def pooled(count, spread, noise, **how):
    antithetic = how.get("antithetic", True)
    found = [Components.of(table(spread, noise, seed=seed, **how), antithetic=antithetic) for seed in range(count)]
    total = found[0]
    for one in found[1:]:
        total = total + one
    return total


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize(("spread", "noise"), [(1.0, 2.0), (0.1, 1.0), (0.5, 0.5), (0.0, 1.0)])
def test_known_components_are_found(antithetic, spread, noise):
    """A pair's members differ by twice the odd part, so its row has sqrt(2) times the spread of a member."""
    found = pooled(200, spread, noise, antithetic=antithetic)
    row = math.sqrt(2) * spread if antithetic else spread
    assert found.noise == pytest.approx(noise, rel=0.02)
    assert found.spread == pytest.approx(row, rel=0.05, abs=0.05)
    assert found.reliability == pytest.approx(8 * row**2 / (8 * row**2 + noise**2), abs=0.06)


def test_what_pairs_have_in_common_is_no_signal():
    assert pooled(50, 0.0, 1.0, even=10.0).z < 2


def test_reliability_is_the_mean_of_all_halves():
    """Guttman's form for each half of the prompts, on scores less the prompts' means."""
    scores = table(1.0, 2.0, pairs=10, prompts=6, antithetic=False, seed=3)
    total = scores.mean(axis=1)
    halves = []
    for chosen in itertools.combinations(range(6), 3):
        one, other = scores[:, chosen], np.delete(scores, chosen, axis=1)
        difference = (one.sum(axis=1) - other.sum(axis=1)).var()
        halves.append(1 - difference / (36 * total.var()))
    found = Components.of(scores, antithetic=False)
    assert found.reliability == pytest.approx(np.mean(halves), rel=1e-9)


@pytest.mark.parametrize(("rows", "prompts"), [(8, 2), (16, 8), (48, 8), (100, 3)])
def test_z_is_normal_where_there_is_only_noise(rows, prompts):
    rng = np.random.default_rng(0)
    values = []
    for _ in range(4000):
        scores = rng.normal(size=(2 * rows, prompts))
        values.append(Components.of(scores, antithetic=True).z)
    assert np.mean(values) == pytest.approx(0, abs=0.06)
    assert np.std(values) == pytest.approx(1, abs=0.06)
    assert np.mean(np.array(values) > 1.645) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros(4), np.zeros((4, 1)), np.zeros((4, 3)), np.full((4, 3), 0.1 + 0.2), np.full((4, 3), np.nan),
        np.ones((2, 3)) * [[1], [2]], np.arange(9.0).reshape(3, 3),
    ],
)  # fmt: skip
def test_nothing_to_tell_apart(scores):
    assert Components.of(scores, antithetic=True) is None


def test_scores_that_are_no_numbers_leave_their_rows_out():
    scores = table(1.0, 1.0)
    with_hole = scores.copy()
    with_hole[5, 2] = np.nan
    left = np.delete(scores, [4, 5], axis=0)
    assert Components.of(with_hole, antithetic=True) == Components.of(left, antithetic=True)


def test_without_noise_everything_is_signal():
    scores = np.repeat(np.arange(8.0)[:, None] ** 2, 3, axis=1)
    found = Components.of(scores, antithetic=True)
    assert (found.reliability, found.noise, found.z) == (1.0, 0.0, math.inf)
    assert found.spread > 0
