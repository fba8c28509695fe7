"""From raw scores to the weights of the estimate."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eggroll.core.config import ESConfig
from eggroll.core.fitness import (
    NonFiniteFitnessWarning,
    centered_rank,
    keep_elite,
    leave_one_out,
    normalized,
    raw,
    replace_non_finite,
    shape_fitness,
)
from eggroll.errors import ConfigError

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


def test_groups_are_centered_alone_and_scaled_together():
    fitness = np.array([1.0, 3.0, 100.0, 300.0])
    expected = np.array([-1.0, 1.0, -100.0, 100.0]) / np.sqrt(fitness.var() + 1e-5)
    np.testing.assert_allclose(shape_fitness(fitness, method="normalized", group_size=2), expected, rtol=1e-6)


def test_prompts_are_centered_alone_and_averaged():
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


def test_finite_scores_warn_about_nothing_and_the_callers_array_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(replace_non_finite(np.array([1.0, 2.0])), [1.0, 2.0])
    with pytest.warns(NonFiniteFitnessWarning):
        replace_non_finite(given := np.array([np.nan, 1.0]))
    assert np.isnan(given[0])


SCORES = np.array([3.0, -1.0, 0.5, 7.0, 2.0, 2.0, -4.0, 1.0])
TABLE = np.stack([SCORES, SCORES[::-1] * 100.0, np.full(8, 2.0)], axis=1)
PIECES = {
    "replace_non_finite": replace_non_finite,
    "raw": raw,
    "centered_rank": centered_rank,
    "centered_rank in groups": lambda x: centered_rank(x, group_size=4),
    "normalized": normalized,
    "normalized in groups": lambda x: normalized(x, group_size=4),
    "normalized, deviation of the group": lambda x: normalized(x, group_size=4, group_std=True),
    "leave_one_out": leave_one_out,
    "leave_one_out in groups": lambda x: leave_one_out(x, group_size=2),
    "keep_elite": lambda x: keep_elite(x if x.ndim == 1 else x.mean(axis=1), 3),
    "shape_fitness": lambda x: shape_fitness(x, method="normalized", group_size=4, elite_k=2),
}


def in_torch(piece):
    torch = pytest.importorskip("torch")
    return lambda x: piece(torch.tensor(x)).numpy()


def in_jax(piece):
    jnp = pytest.importorskip("jax.numpy")
    return lambda x: piece(jnp.asarray(x))


def in_jit(piece):
    jax = pytest.importorskip("jax")
    return lambda x: jax.jit(piece)(jax.numpy.asarray(x))


@pytest.mark.parametrize("library", [in_torch, in_jax, in_jit], ids=lambda x: x.__name__)
@pytest.mark.parametrize("scores", [SCORES, TABLE], ids=["one score", "prompts"])
@pytest.mark.parametrize("name", PIECES)
def test_every_piece_is_the_same_in_every_library(name, scores, library):
    piece = PIECES[name]
    expected = piece(scores)
    got = library(piece)(scores)
    assert got.shape == expected.shape
    assert got.dtype == (expected.dtype if library is in_torch else np.float32)
    tolerance = np.finfo(got.dtype).eps * 16
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(scores).max())


@pytest.mark.parametrize("library", [in_torch, in_jax, in_jit], ids=lambda x: x.__name__)
def test_non_finite_scores_are_the_worst_in_every_library(library):
    bad = np.array([1.0, np.nan, 3.0, -np.inf])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(library(replace_non_finite)(bad), [1.0, 1.0, 3.0, 1.0])
        np.testing.assert_array_equal(library(replace_non_finite)(np.full(3, np.nan)), np.zeros(3))
    counted = [str(warning.message) for warning in caught if warning.category is NonFiniteFitnessWarning]
    assert [text.partition(" scores")[0] for text in counted] == ([] if library is in_jit else ["2 of 4", "3 of 3"])


def by_sign(fitness):
    """A shaping of a user's own."""
    return (fitness > fitness.mean()) * 2.0 - 1.0


def test_a_shaping_of_ones_own_comes_back_from_the_settings_of_a_run():
    config = ESConfig(population_size=4, fitness_shaping=by_sign, elite_k=1)
    stored = config.to_dict()
    assert stored["fitness_shaping"] == f"{__name__}:by_sign"
    scores = np.array([1.0, 2.0, 6.0, 3.0])
    np.testing.assert_array_equal(config.shape(scores), [0.0, 0.0, 2.0, 0.0])
    library = ESConfig.from_dict(stored | {"fitness_shaping": "eggroll.core.fitness:normalized"})
    np.testing.assert_array_equal(library.shape(scores), shape_fitness(scores, method="normalized", elite_k=1))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("no_such_module_anywhere:f", r"fitness_shaping \(='no_such.*:f'\) cannot be imported .*No module named"),
        ("eggroll.core.fitness:centred", "cannot be imported .*has no attribute 'centred'"),
        ("eggroll.core.fitness:VARIANCE_EPSILON", "is no function"),
        ("sign", "there is no fitness shaping 'sign'; use centered_rank, normalized, raw, or a function"),
        (lambda fitness: fitness[:2], r"gave the shape \(2,\) for scores of the shape \(4,\); it must give one weight"),
    ],
)
def test_shapings_that_cannot_work(method, message):
    with pytest.raises(ConfigError, match=message):
        shape_fitness(np.arange(4.0), method=method)


def test_a_function_without_a_name_cannot_be_written_to_a_run():
    config = ESConfig(fitness_shaping=lambda fitness: fitness)
    with pytest.raises(ConfigError, match=r"(?s)cannot be written to a run's settings.*defined at the top of a module"):
        config.to_dict()
