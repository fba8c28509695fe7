"""The update's rule: pairs, thresholds, schedules, momentum, and that it finds what raises fitness."""

import numpy as np
import pytest

from eggroll.pretrain import update
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.engines import choose
from eggroll.pretrain.model import oracle
from eggroll.pretrain.model.noise import Noise
from eggroll.pretrain.model.shape import ModelShape, Parameter


def test_signs_of_pairs():
    assert update.shape_pairs(np.array([5, 3, -9, -2, 4, 4])).tolist() == [16, -16, 0]


def test_normalized_differences():
    scores = np.array([10, 0, 0, 10, 30, 0, -5, -5])  # differences 10, -10, 30, 0; root mean square 16.6, so 16
    assert update.shape_pairs(scores, "normalized").tolist() == [10, -10, 30, 0]
    assert update.shape_pairs(np.zeros(6, int), "normalized").tolist() == [0, 0, 0]
    one = np.zeros(2000, int)
    one[0] = 10**6
    assert update.shape_pairs(one, "normalized").max() == 127


def test_the_sum_is_a_product_of_factors():
    draws = np.array([[[1, 2, 3, 4]], [[5, 6, 7, 8]]], np.int8)  # B = 1 2, A = 3 4 of the first pair
    pairs = np.array([16, -16], np.int8)
    expected = np.outer([3, 4], [1, 2]) - np.outer([7, 8], [5, 6])
    assert np.array_equal(update.sum_of_draws(Parameter("w", (2, 2), "matrix"), draws, pairs), expected)
    assert np.array_equal(update.sum_of_draws(Parameter("e", (2, 2), "embedding"), draws, pairs), expected.T)
    vector = update.sum_of_draws(Parameter("b", (2,), "vector"), draws, pairs)
    assert vector.tolist() == [3 * 1 - 7 * 5, 4 * 2 - 8 * 6]
    half = update.sum_of_draws(Parameter("w", (2, 2), "matrix"), draws, np.array([8, 0], np.int8))
    assert np.array_equal(half, np.outer([1, 2], [1, 2]))  # (8 * 3) >> 4 = 1
    signs = update.sum_of_draws(Parameter("w", (2, 2), "matrix"), draws, pairs[:1].repeat(2), sign_of_noise=True)
    assert np.array_equal(signs, np.full((2, 2), 512))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shaping", ["sign", "normalized"])
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("sign_of_noise", [False, True])
def test_without_a_signal_the_promised_share_moves(rank, shaping, alpha, sign_of_noise):
    shape, pairs = ModelShape(256, 64, 1), 500
    params = oracle.init_params(shape)
    made = choose.make_engine(params, Noise(0, rank, table_size=1 << 20))
    weights = update.shape_pairs(np.random.default_rng(1).integers(0, 10**6, 2 * pairs), shaping)
    step = update.make_step(weights, alpha, rank, sign_of_noise=sign_of_noise)
    share = made.update(0, np.arange(pairs), weights, step) / shape.size
    # Thresholds are rounded down to sixteenths of a standard deviation: up to a fifth more at 2 of them. Signs are 0
    # for 2.5 % of the draws, which takes 5 % from the sum's variance.
    assert 0.88 * alpha < share < 1.25 * alpha


def test_momentum_moves_the_promised_share_and_remembers():
    shape, pairs = ModelShape(256, 64, 1), 400
    rng, shares = np.random.default_rng(1), []
    made = choose.make_engine(oracle.init_params(shape), Noise(0, 1, table_size=1 << 20))
    for generation in range(12):
        weights = update.shape_pairs(rng.integers(0, 10**6, 2 * pairs))
        step = update.make_step(weights, 0.1, 1, generation=generation, momentum_shift=2)
        shares.append(made.update(generation, np.arange(pairs), weights, step) / shape.size)
    assert all(0.085 < share < 0.13 for share in shares)
    remembered = made.momentum["blocks.0.gru.Wf"].copy()
    none = np.zeros(pairs, np.int8)
    made.update(12, np.arange(pairs), none, update.make_step(none, 0.1, 1, generation=12, momentum_shift=2))
    kept = made.momentum["blocks.0.gru.Wf"]
    assert np.abs(kept - 0.75 * remembered).max() <= 0.5


def test_weights_stay_within_their_range_and_ties_do_nothing():
    params = {p.name: np.full(p.shape, 127, np.int8) for p in ModelShape(256, 16, 1).parameters}
    made = choose.make_engine(params, Noise(table_size=1 << 16))
    weights = np.full(30, 16, np.int8)
    made.update(0, np.arange(30), weights, update.make_step(weights, 1.0, 1))
    assert {126, 127} == set(np.unique(np.concatenate([v.ravel() for v in made.params.values()])).tolist())
    before = {name: value.copy() for name, value in made.params.items()}
    none = np.zeros(30, np.int8)
    assert made.update(1, np.arange(30), none, update.make_step(none, 1.0, 1)) == 0
    assert all(np.array_equal(before[name], made.params[name]) for name in before)


def test_schedules():
    assert update.alpha_at(0) == 1.0
    assert update.alpha_at(1000) == 1 / 16
    config = PretrainOptions(alpha_schedule="exponential", alpha=0.5, alpha_final=0.02, generations=10).es()
    assert config.lr_at(0) == 0.5
    assert config.lr_at(10) == pytest.approx(0.02)
    assert config.lr_at(5) == pytest.approx(0.1)
    paper = PretrainOptions().es()
    assert paper.lr_at(200) == 1 / 4
    assert paper.sigma_at(999) == 2**-4
