"""The streamed estimate equals the float64 oracle, whatever is kept, drawn again or cut into chunks."""

import itertools

import numpy as np
import pytest
import torch

from eggroll.core import oracle
from eggroll.core.fitness import shape_fitness
from eggroll.core.select import ParameterSpec
from eggroll.torch import noise as noise_module
from eggroll.torch.gradient import es_gradient, pair_weights
from eggroll.torch.noise import Noise

SPECS = [
    ParameterSpec("linear.weight", (12, 7), "matrix"),
    ParameterSpec("head.weight", (1, 9), "matrix"),
    ParameterSpec("embed.weight", (20, 6), "embedding"),
    ParameterSpec("conv.weight", (5, 3, 3, 2), "conv"),
    ParameterSpec("experts.weight", (3, 6, 4), "experts"),
    ParameterSpec("norm.weight", (11,), "vector"),
    ParameterSpec("table", (2, 3, 4, 5), "other"),
]
CPU = torch.device("cpu")


def weights_of(size, *, sampling="antithetic", method="centered_rank", elite_k=0):
    scores = np.random.default_rng(size).normal(size=(size, 3))
    return shape_fitness(scores, method=method, sampling=sampling, elite_k=elite_k)


def estimate(noise, spec, weights, generation, *, antithetic=True):
    return es_gradient(noise, spec, weights, generation, antithetic=antithetic, device=CPU)


def agrees(spec, weights, *, rank=2, generation=3, antithetic=True, noise_reuse=1, seed=11, allowed=1e-6):
    noise = Noise(SPECS, rank, seed, noise_reuse)
    got = estimate(noise, spec, weights, generation, antithetic=antithetic)
    expected = oracle.es_gradient(
        spec, weights, rank=rank, seed=seed, generation=generation, antithetic=antithetic, noise_reuse=noise_reuse
    )
    assert got.dtype == torch.float32
    assert tuple(got.shape) == spec.shape == expected.shape
    difference = np.linalg.norm(got.double().numpy() - expected) / np.linalg.norm(expected)
    assert difference <= allowed, f"{spec.name} differs by {difference:.1e}"
    return True


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("antithetic", [True, False], ids=["pairs", "one-sided"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind + str(spec.shape))
def test_equals_the_oracle(spec, antithetic, rank):
    weights = weights_of(16, sampling="antithetic" if antithetic else "one_sided")
    assert agrees(spec, weights, rank=rank, antithetic=antithetic)


@pytest.mark.parametrize("generation", [0, 1, 2, 3, 2**31])
@pytest.mark.parametrize("noise_reuse", [1, 2, 3])
def test_noise_that_is_used_again(generation, noise_reuse):
    for spec in SPECS[:5:4]:
        assert agrees(spec, weights_of(8), generation=generation, noise_reuse=noise_reuse)


@pytest.mark.parametrize("method", ["centered_rank", "normalized", "raw"])
@pytest.mark.parametrize("elite_k", [0, 1, 5])
def test_any_shaping(method, elite_k):
    for spec, antithetic in itertools.product(SPECS, (True, False)):
        sampling = "antithetic" if antithetic else "one_sided"
        weights = weights_of(12, sampling=sampling, method=method, elite_k=elite_k)
        assert agrees(spec, weights, antithetic=antithetic)


def test_a_single_member_that_counts():
    weights = np.zeros(10, dtype=np.float32)
    weights[7] = 0.25
    for spec, antithetic in itertools.product(SPECS, (True, False)):
        assert agrees(spec, weights, antithetic=antithetic)


def test_equal_members_move_nothing():
    noise = Noise(SPECS, 2, 0)
    for spec in SPECS:
        assert not estimate(noise, spec, np.full(8, 0.5, dtype=np.float32), 0).any()
        assert not estimate(noise, spec, np.zeros(8, dtype=np.float32), 0).any()


def test_members_whose_weight_is_zero_are_not_drawn(monkeypatch):
    drawn = []
    real = noise_module.normals
    monkeypatch.setattr(
        noise_module, "normals", lambda keys, *args, **kw: drawn.append(len(keys)) or real(keys, *args, **kw)
    )
    weights = np.zeros(20, dtype=np.float32)
    weights[[2, 3, 17]] = 0.5, -0.5, 0.25  # pairs 1 and 8
    assert agrees(SPECS[0], weights)
    assert drawn == [2]


def test_a_large_population_of_large_numbers():
    """4096 members: float32 sums of terms that mostly cancel; the error grows with the root of their number."""
    weights = np.random.default_rng(0).normal(size=4096).astype(np.float32) * 1e4
    assert agrees(ParameterSpec("linear.weight", (4, 3), "matrix"), weights, allowed=5e-6)
    assert agrees(ParameterSpec("norm.weight", (5,), "vector"), weights, allowed=5e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind + str(spec.shape))
@pytest.mark.parametrize("antithetic", [True, False], ids=["pairs", "one-sided"])
def test_kept_noise_gives_the_same_bits(spec, antithetic):
    weights = weights_of(24)
    weights[[4, 5]] = 0.0
    results = []
    for cache_bytes, prepared in ((0, False), (2**30, False), (2**30, True), (2**30, 99)):
        noise = Noise(SPECS, 2, 5, cache_bytes=cache_bytes)
        if prepared:
            generation = 3 if prepared is True else 99  # the noise of another generation must not be taken
            assert noise.prepare(generation, 24, CPU)
        results.append(estimate(noise, spec, weights, 3, antithetic=antithetic))
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind + str(spec.shape))
def test_chunks_change_the_order_of_the_sum_only(spec, monkeypatch):
    weights = weights_of(32)
    whole = estimate(Noise(SPECS, 2, 5), spec, weights, 0)
    for pairs_per_chunk in (1, 3, 5):
        monkeypatch.setattr(noise_module, "CHUNK_BYTES", pairs_per_chunk * 4 * spec.draw_size(2))
        parts = estimate(Noise(SPECS, 2, 5), spec, weights, 0)
        assert (parts - whole).norm() <= 1e-6 * whole.norm()
        kept = Noise(SPECS, 2, 5)
        kept.prepare(0, 16, CPU)
        assert estimate(kept, spec, weights, 0).equal(parts)
        assert agrees(spec, weights)


def test_a_buffer_is_overwritten():
    buffer = torch.full((12, 7), 3.0)
    weights = weights_of(8)
    noise = Noise(SPECS, 2, 11)
    result = es_gradient(noise, SPECS[0], weights, 0, antithetic=True, device=CPU, out=buffer)
    assert result is buffer
    assert result.equal(estimate(noise, SPECS[0], weights, 0))


def test_pair_weights():
    weights = np.array([3, 1, -2, 5], dtype=np.float32)
    np.testing.assert_array_equal(pair_weights(weights, antithetic=True), [2, -7])
    np.testing.assert_array_equal(pair_weights(weights, antithetic=False), weights)


def test_not_the_product_of_two_sums():
    """(sum s A)(sum s B)^T has rank r; the estimate has rank min(K r, m, n), and another value."""
    spec, weights = ParameterSpec("w", (12, 7), "matrix"), weights_of(16)
    noise = Noise([spec], 1, 0)
    estimated = estimate(noise, spec, weights, 0)
    assert torch.linalg.matrix_rank(estimated) == 7
    draws = noise.draw(0, range(8), CPU)["w"]
    a, b = noise.factors(spec, draws)
    w_K = torch.from_numpy(pair_weights(weights, antithetic=True)).view(-1, 1, 1)
    wrong = (w_K * a).sum(0) @ (w_K * b).sum(0).T / len(weights)
    assert torch.linalg.matrix_rank(wrong) == 1
    assert (wrong - estimated).norm() > 0.5 * estimated.norm()
