"""From raw scores to the weights of the estimate."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eggroll.core.fitness import NonFiniteFitnessWarning, centered_rank, replace_non_finite, shape_fitness

METHODS = ("centered_rank", "normalized", "raw")
scores = arrays(np.float64, st.integers(2, 40), elements=st.integers(-5, 5).map(float))


def test_ranks_are_evenly_spaced_from_minus_half_to_half():
    np.testing.assert_allclose(centered_rank(np.array([10.0, -3.0, 0.5, 99.0, 7.0])), [0.25, -0.5, -0.25, 0.5, 0.0])


def test_ties_share_their_mean_rank():
    np.testing.assert_allclose(centered_rank(np.array([1.0, 2.0, 2.0, 3.0])), [-0.5, 0.0, 0.0, 0.5])
    np.testing.assert_allclose(centered_rank(np.array([5.0, 5.0, 1.0])), [0.25, 0.25, -0.5])


@pytest.mark.parametrize("method", ["centered_rank", "normalized"])
def test_equal_scores_teach_nothing(method):
    np.testing.assert_array_equal(shape_fitness(np.full(6, 3.25), method=method), np.zeros(6))


def test_a_single_member_has_no_rank():
    np.testing.assert_array_equal(centered_rank(np.array([4.0])), [0.0])


@given(scores)
def test_ranks_sum_to_zero_and_ignore_monotone_maps(fitness):
    ranks = centered_rank(fitness)
    assert abs(ranks.sum()) < 1e-9
    np.testing.assert_array_equal(ranks, centered_rank(np.exp(fitness)))
    np.testing.assert_allclose(centered_rank(-fitness), -ranks, atol=1e-12)


@given(scores, st.randoms(use_true_random=False))
@pytest.mark.parametrize("method", METHODS)
def test_shaping_follows_the_members(method, fitness, random):
    """Renumbering the members renumbers their weights and does nothing else."""
    order = list(range(len(fitness)))
    random.shuffle(order)
    np.testing.assert_allclose(
        shape_fitness(fitness[order], method=method), shape_fitness(fitness, method=method)[order], atol=1e-6
    )


def test_normalized_is_a_z_score():
    fitness = np.array([1.0, 2.0, 3.0, 6.0])
    expected = (fitness - 3.0) / np.sqrt(3.5 + 1e-5)
    np.testing.assert_allclose(shape_fitness(fitness, method="normalized"), expected, rtol=1e-6)


def test_raw_is_as_given():
    np.testing.assert_array_equal(shape_fitness(np.array([1.5, -2.0]), method="raw"), np.float32([1.5, -2.0]))


def test_weights_are_float32():
    for method in METHODS:
        assert shape_fitness(np.array([1.0, 2.0]), method=method).dtype == np.float32


def test_groups_are_ranked_by_themselves():
    fitness = np.array([1.0, 2.0, 3.0, 100.0, 300.0, 200.0])
    np.testing.assert_allclose(shape_fitness(fitness, group_size=3), [-0.5, 0.0, 0.5, -0.5, 0.5, 0.0])


def test_groups_are_centred_alone_and_scaled_together():
    fitness = np.array([1.0, 3.0, 100.0, 300.0])
    expected = np.array([-1.0, 1.0, -100.0, 100.0]) / np.sqrt(fitness.var() + 1e-5)
    np.testing.assert_allclose(shape_fitness(fitness, method="normalized", group_size=2), expected, rtol=1e-6)


def test_prompts_are_centred_alone_and_averaged():
    """Columns are prompts: a hard prompt does not count less, and an easy one does not drown it."""
    table = np.array([[1.0, 1000.0], [3.0, 1000.0]])
    expected = np.array([-1.0, 1.0]) / np.sqrt(table.var() + 1e-5) / 2
    np.testing.assert_allclose(shape_fitness(table, method="normalized"), expected, rtol=1e-5)
    table = np.array([[1.0, 900.0], [2.0, 800.0], [3.0, 100.0]])
    np.testing.assert_allclose(shape_fitness(table, method="centered_rank"), [0.0, 0.0, 0.0], atol=1e-7)


def test_one_prompt_is_the_same_as_none():
    fitness = np.array([3.0, 1.0, 2.0, 2.0])
    for method in METHODS:
        np.testing.assert_array_equal(
            shape_fitness(fitness[:, None], method=method), shape_fitness(fitness, method=method)
        )


def test_leave_one_out_subtracts_the_mean_of_the_others():
    fitness = np.array([1.0, 2.0, 6.0, 7.0])
    expected = [value - np.delete(fitness, index).mean() for index, value in enumerate(fitness)]
    weights = shape_fitness(fitness, method="raw", sampling="one_sided")
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_leave_one_out_works_within_groups():
    fitness = np.array([1.0, 2.0, 60.0, 80.0])
    weights = shape_fitness(fitness, method="raw", sampling="one_sided", group_size=2)
    np.testing.assert_allclose(weights, [-1.0, 1.0, -20.0, 20.0], rtol=1e-6)


@pytest.mark.parametrize("members", [2, 3, 4])
def test_leave_one_out_is_unbiased(members):
    """Exactly, by going through every population: with noise of -1 or +1 there are 2**N of them.

    The mean over all populations of (1/N) sum_p s_p E_p is E[f(E) E], whatever f is. With the plain mean as the
    baseline it is (N-1)/N of that.
    """
    score = {-1: 0.7, 1: 2.9}
    target = sum(score[sign] * sign for sign in (-1, 1)) / 2
    estimates, plain = [], []
    for population in itertools.product((-1, 1), repeat=members):
        noise = np.array(population, dtype=np.float64)
        fitness = np.array([score[sign] for sign in population])
        estimates.append(np.mean(shape_fitness(fitness, method="raw", sampling="one_sided") * noise))
        plain.append(np.mean((fitness - fitness.mean()) * noise))
    assert np.mean(estimates) == pytest.approx(target, rel=1e-6)
    assert np.mean(plain) == pytest.approx(target * (members - 1) / members, rel=1e-6)


def test_elite_counts_the_best_with_their_margin_over_the_rest():
    fitness = np.array([1.0, 5.0, 2.0, 4.0])
    np.testing.assert_allclose(shape_fitness(fitness, method="raw", elite_k=2), [0.0, 3.0, 0.0, 2.0])


@given(scores, st.integers(1, 39))
def test_elite_never_has_more_than_k_and_keeps_the_order(fitness, elite_k):
    elite_k = min(elite_k, len(fitness) - 1)
    weights = shape_fitness(fitness, elite_k=elite_k)
    assert np.count_nonzero(weights) <= elite_k
    assert (weights >= 0).all()
    order = np.argsort(fitness, kind="stable")
    assert (np.diff(weights[order]) >= 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_non_finite_score_is_the_worst(bad):
    with pytest.warns(NonFiniteFitnessWarning, match=r"^1 of 4 scores were NaN or infinite; they count as the worst"):
        weights = shape_fitness(np.array([3.0, bad, 1.0, 2.0]))
    # It ties with the worst finite score: ranks 0.5, 0.5, 2, 3 of 3.
    np.testing.assert_allclose(weights, [0.5, -1 / 3, -1 / 3, 1 / 6], rtol=1e-6)


def test_the_warning_counts_all_of_them_and_points_at_the_caller():
    with pytest.warns(NonFiniteFitnessWarning, match="^3 of 4 scores") as caught:
        shape_fitness(np.array([np.nan, np.inf, -np.inf, 2.0]), method="raw")
    assert [warning.filename for warning in caught] == [__file__]


def test_nothing_finite_changes_nothing():
    for method in METHODS:
        with pytest.warns(NonFiniteFitnessWarning, match="^4 of 4 scores"):
            weights = shape_fitness(np.array([np.nan, np.nan, np.inf, -np.inf]), method=method)
        np.testing.assert_array_equal(weights, np.zeros(4))


def test_finite_scores_warn_about_nothing_and_are_not_changed():
    fitness = np.array([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, count = replace_non_finite(fitness)
    assert count == 0
    assert values is not fitness
    with pytest.warns(NonFiniteFitnessWarning):
        replace_non_finite(given := np.array([np.nan, 1.0]))
    assert np.isnan(given[0]), "the caller's array is left alone"
