"""The oracle against closed forms: it is what every fast path is tested against, so nothing else tests it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll.core import oracle
from eggroll.core.address import factor_draw, member_of
from eggroll.core.select import ParameterSpec

SPECS = [
    ParameterSpec("linear.weight", (6, 4), "matrix"),
    ParameterSpec("embed.weight", (9, 5), "embedding"),
    ParameterSpec("conv.weight", (4, 3, 2, 2), "conv"),
    ParameterSpec("experts.up", (3, 4, 5), "experts"),
    ParameterSpec("norm.weight", (7,), "vector"),
    ParameterSpec("gate.table", (2, 3, 2), "other"),
]
NAMED = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
DRAW = {"rank": 3, "seed": 11, "generation": 4}


@NAMED
def test_a_perturbation_is_the_product_of_its_factors(spec):
    noise = oracle.perturbation(spec, 5, **DRAW)
    assert noise.shape == spec.shape
    assert noise.dtype == np.float64
    if spec.low_rank:
        a, b = (factor.astype(np.float64) for factor in factor_draw(spec, 3, 11, 4, pair=2))
        expected = -np.einsum("...ir,...jr->...ij", a, b) / 3**0.5
        np.testing.assert_allclose(noise, expected.reshape(spec.shape), rtol=1e-12)


@NAMED
def test_pairs_are_mirrored(spec):
    for pair in range(3):
        plus, minus = (oracle.perturbation(spec, 2 * pair + side, **DRAW) for side in (0, 1))
        np.testing.assert_array_equal(plus, -minus)


@NAMED
def test_one_sided_members_have_noise_of_their_own(spec):
    first, second = (oracle.perturbation(spec, member, antithetic=False, **DRAW) for member in (0, 1))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.99
    assert member_of(1, antithetic=False).sign == 1


@NAMED
@pytest.mark.parametrize("rank", [1, 4])
def test_entries_have_unit_variance(spec, rank):
    """Over 2,000 pairs: the mean square of all entries is 1, whatever the rank.

    The squares of E = A B^T / sqrt(r) have variance 2 + 6/r (2 for dense noise), and entries that share a factor are
    correlated, so the mean square over d entries varies less than a single entry's: sqrt(8 / 2000) = 0.063.
    """
    squares = [
        np.mean(oracle.perturbation(spec, 2 * pair, rank=rank, seed=0, generation=0) ** 2) for pair in range(2000)
    ]
    assert abs(np.mean(squares) - 1) < 4 * 0.063


@NAMED
def test_the_estimate_is_the_weighted_mean_of_the_perturbations(spec):
    shaped = np.array([0.5, -0.2, 0.0, 1.0, -0.7, 0.1])
    expected = sum(w * oracle.perturbation(spec, p, **DRAW) for p, w in enumerate(shaped)) / 6
    np.testing.assert_allclose(oracle.es_gradient(spec, shaped, **DRAW), expected, rtol=1e-12)


@settings(max_examples=25)
@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 3), population=st.integers(1, 5))
def test_rank_of_the_update(m, n, rank, population):
    """min(N r, m, n): low-rank perturbations add up to an update of full rank."""
    spec = ParameterSpec("w", (m, n), "matrix")
    shaped = np.linspace(1.0, 2.0, population)
    update = oracle.es_gradient(spec, shaped, rank=rank, seed=3, generation=0, antithetic=False)
    assert np.linalg.matrix_rank(update) == min(population * rank, m, n)


def test_a_pair_counts_once_in_the_rank():
    """Both signs of a pair share their factors: N = 4 antithetic members are two directions."""
    spec = ParameterSpec("w", (8, 8), "matrix")
    update = oracle.es_gradient(spec, [1.0, 0.2, 0.5, -0.5], rank=1, seed=3, generation=0)
    assert np.linalg.matrix_rank(update) == 2


def test_the_sum_of_products_is_not_the_product_of_sums():
    """``(sum s A)(sum s B)^T`` has cross terms ``s_p s_q A_p B_q^T``, and rank r. It is another, wrong, matrix."""
    spec = ParameterSpec("w", (8, 6), "matrix")
    rank, shaped = 1, np.array([0.5, -0.25, 1.0, 0.75])
    right = oracle.es_gradient(spec, shaped, rank=rank, seed=1, generation=0, antithetic=False) * len(shaped)
    factors = [factor_draw(spec, rank, 1, 0, pair) for pair in range(4)]
    wrong = sum(s * a for s, (a, _) in zip(shaped, factors, strict=True)) @ (
        sum(s * b for s, (_, b) in zip(shaped, factors, strict=True)).T
    )
    assert np.linalg.matrix_rank(wrong) == rank
    assert np.linalg.matrix_rank(right) == 4
    cosine = (right * wrong).sum() / np.linalg.norm(right) / np.linalg.norm(wrong)
    assert cosine < 0.9
    # The right sum as every fast path makes it: one product over the stacked factors.
    stacked_a = np.concatenate([s * a for s, (a, _) in zip(shaped, factors, strict=True)], axis=1)
    stacked_b = np.concatenate([b for _, b in factors], axis=1)
    np.testing.assert_allclose(stacked_a @ stacked_b.T, right, rtol=1e-5, atol=1e-6)


def test_members_are_the_centre_plus_sigma_times_noise():
    params = {spec.name: np.full(spec.shape, 2.0, np.float32) for spec in SPECS} | {"frozen": np.ones(3)}
    member = oracle.member_params(params, SPECS[:2], 3, sigma=0.1, **DRAW)
    for spec in SPECS[:2]:
        np.testing.assert_allclose(member[spec.name], 2.0 + 0.1 * oracle.perturbation(spec, 3, **DRAW))
    for name in [spec.name for spec in SPECS[2:]] + ["frozen"]:
        np.testing.assert_array_equal(member[name], params[name])
    assert all(np.all(params[spec.name] == 2.0) for spec in SPECS), "the center is left alone"


def test_a_step_goes_up_by_lr_times_the_estimate():
    params = {spec.name: np.zeros(spec.shape) for spec in SPECS}
    shaped = [0.5, -0.5, 0.1, -0.1]
    after = oracle.sgd_step(params, SPECS, shaped, lr=0.3, **DRAW)
    for spec in SPECS:
        np.testing.assert_allclose(after[spec.name], 0.3 * oracle.es_gradient(spec, shaped, **DRAW), rtol=1e-12)


def test_steps_climb_a_quadratic():
    """f(W) = -|W - W*|^2 / 2, 60 steps: the distance shrinks at the rate that the closed form gives.

    With raw antithetic fitness the expected step is lr * sigma * (W* - W), so each step takes a share lr * sigma = 0.1
    of the distance in expectation; the noise of a step (relative variance (mn + 1 + 2 (m + n + 1) / r) / pairs = 0.67)
    adds 0.01 * 0.67 to the factor 0.81 on the squared distance. 0.817**60 = 5e-6.
    """
    spec = ParameterSpec("w", (4, 3), "matrix")
    target = np.arange(12.0).reshape(4, 3) / 4
    params = {"w": np.zeros((4, 3))}
    draw = {"rank": 2, "seed": 0}
    sigma, lr, population = 0.1, 1.0, 62
    for generation in range(60):
        members = [
            oracle.member_params(params, [spec], p, sigma=sigma, generation=generation, **draw)
            for p in range(population)
        ]
        fitness = [-((member["w"] - target) ** 2).sum() / 2 for member in members]
        params = oracle.sgd_step(params, [spec], fitness, lr=lr, generation=generation, **draw)
    remaining = ((params["w"] - target) ** 2).sum() / (target**2).sum()
    assert remaining < 1e-4
