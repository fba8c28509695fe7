"""Ask, evaluate, tell in JAX: against the oracle, against PyTorch, over chunks, devices and shapings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

from eggroll.core import oracle  # noqa: E402
from eggroll.core.config import ESConfig  # noqa: E402
from eggroll.core.fitness import NonFiniteFitnessWarning  # noqa: E402
from eggroll.core.fitness import shape_fitness as reference_shaping  # noqa: E402
from eggroll.core.noise_spec import NoiseSpec  # noqa: E402
from eggroll.core.select import ParameterSpec  # noqa: E402
from eggroll.errors import ConfigError  # noqa: E402
from eggroll.jax.gradient import es_gradient  # noqa: E402
from eggroll.jax.noise import Leaf  # noqa: E402
from eggroll.jax.strategy import Strategy  # noqa: E402

LEAVES = [Leaf("w1", (5, 4), 0, 1), Leaf("w2", (5, 4), 0, 1), Leaf("b", (5,), 0, 0), Leaf("e", (2, 3, 4), 1, 1)]


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 1), shape)


def params():
    return {"b": jnp.zeros(3), "w1": normal(4, 8) / 2, "w2": normal(8, 3) / 3}


def fitness(params, x):
    return -jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b"] - x[:, :3]) ** 2)


@pytest.mark.parametrize("sampling", ["antithetic", "one_sided"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("draw_bytes", [2**26, 2000])
def test_gradient_is_the_dense_sum_over_members(sampling, rank, draw_bytes):
    members = 10
    weights = np.asarray(normal(members, seed=3))
    noise = NoiseSpec(9, rank, sampling == "antithetic", noise_reuse=2)
    got = es_gradient(noise, LEAVES, weights, 4, draw_bytes=draw_bytes)
    for leaf in LEAVES:
        expected = oracle.es_gradient(
            leaf.spec, weights, rank=rank, seed=9, generation=4, antithetic=sampling == "antithetic", noise_reuse=2
        )
        np.testing.assert_allclose(got[leaf.name], expected.reshape(leaf.shape), atol=2e-6)


@pytest.mark.parametrize("shaping", ["centered_rank", "normalized", "raw"])
@pytest.mark.parametrize("sampling", ["antithetic", "one_sided"])
@pytest.mark.parametrize(("group_size", "elite_k"), [(0, 0), (4, 0), (0, 3)])
def test_shaping_is_that_of_the_core(shaping, sampling, group_size, elite_k):
    scores = np.asarray(normal(12, seed=5)).round(1)
    scores[3] = scores[7]
    config = ESConfig(
        population_size=12, fitness_shaping=shaping, sampling=sampling, group_size=group_size, elite_k=elite_k
    )
    expected = reference_shaping(scores, method=shaping, sampling=sampling, group_size=group_size, elite_k=elite_k)
    for shape in (config.shape, jax.jit(config.shape)):
        np.testing.assert_allclose(shape(jnp.asarray(scores)), expected, atol=1e-6)


def test_invalid_scores_count_as_the_worst():
    config = ESConfig(population_size=4)
    expected = reference_shaping(np.array([1.0, 1.0, 3.0, 1.0]))
    bad, nothing = jnp.array([1.0, jnp.nan, 3.0, -jnp.inf]), jnp.full(4, jnp.nan)
    with pytest.warns(NonFiniteFitnessWarning, match="2 of 4 scores were NaN or infinite"):
        np.testing.assert_allclose(config.shape(bad), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(config.shape)(bad), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(config.shape)(nothing), np.zeros(4), atol=1e-6)
    with pytest.warns(NonFiniteFitnessWarning, match="4 of 4"):
        np.testing.assert_array_equal(config.shape(nothing), np.zeros(4))


@pytest.mark.parametrize("members_per_forward", [0, 1, 6])
def test_a_generation_is_the_oracles(members_per_forward):
    config = ESConfig(population_size=16, sigma=0.2, lr=0.5, rank=2, seed=3, fitness_shaping="normalized")
    strategy = Strategy(fitness, config, members_per_forward=members_per_forward)
    state, x, score = strategy.init(params()), normal(6, 4), jax.jit(fitness)
    names = {leaf.name: leaf for leaf in strategy.leaves(state.params, x)}
    for generation in range(3):
        center = {name: np.asarray(value) for name, value in state.params.items()}
        specs = [leaf.spec for leaf in names.values()]
        common = {"rank": 2, "seed": 3, "generation": generation}
        scores = []
        for member in range(16):
            twin = oracle.member_params(center, specs, member, sigma=0.2, **common)
            scores.append(float(score({n: jnp.asarray(v, jnp.float32) for n, v in twin.items()}, x)))
        weights = reference_shaping(np.array(scores), method="normalized")
        expected = oracle.sgd_step(center, specs, weights, lr=0.5, **common)
        state, got = strategy.step(state, x)
        np.testing.assert_allclose(got, scores, atol=1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(state.params[name], value, atol=2e-5)
    assert int(state.generation) == 3


def test_ask_evaluate_tell_is_step_and_ask_gives_the_addresses():
    config = ESConfig(population_size=8, sigma=0.1, lr=0.3, rank=1, optimizer="adam", seed=1)
    strategy, x = Strategy(fitness, config), normal(5, 4)
    state = strategy.init(params())
    scores = strategy.evaluate(state, x)
    by_hand = jax.vmap(lambda address: strategy.apply(state.params, x, address))(strategy.ask(state))
    np.testing.assert_allclose(by_hand, scores, atol=1e-6)
    told, (stepped, _) = strategy.tell(state, scores), strategy.step(state, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), told, stepped)


@pytest.mark.parametrize("anchored", [0.0, 2.0])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_the_same_update_as_pytorch(optimizer, anchored):
    torch = pytest.importorskip("torch")
    from eggroll.core.records import UpdateRecord
    from eggroll.torch import Replica

    config = ESConfig(
        population_size=12,
        sigma=0.1,
        lr=0.05,
        rank=2,
        optimizer=optimizer,
        weight_decay=0.01,
        seed=8,
        generations=5,
        anchored_weight_decay=anchored,
    )
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).eval()
    start = {name: jnp.array(value.detach().numpy().copy()) for name, value in model.named_parameters()}
    replica = Replica(model, config, kinds=("matrix", "vector"))

    def score(p, x):
        return jnp.sum(jnp.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"])

    strategy = Strategy(score, config)
    state = strategy.init(start)
    strategy.leaves(state.params, normal(3, 4))
    for generation in range(4):
        weights = np.asarray(normal(12, seed=generation))
        record = UpdateRecord.make(generation, 0.1, config.lr_at(generation), weights)
        replica.apply(record)
        state = strategy.tell(state, record.weights, shaped=True)
    for name, value in model.named_parameters():
        np.testing.assert_allclose(state.params[name], value.detach().numpy(), atol=1e-5)


def test_learns_with_any_optax_optimizer_and_its_own_learning_rate():
    config = ESConfig(population_size=64, sigma=0.05, lr=123.0, rank=1, fitness_shaping="normalized", generations=60)
    strategy, x = Strategy(fitness, config, optimizer=optax.adam(0.03)), normal(32, 4)
    state = strategy.init(params())
    before = float(fitness(state.params, x))
    for _ in range(60):
        state, _ = strategy.step(state, x)
    assert float(fitness(state.params, x)) > before / 4  # scores are negative


def test_each_member_can_have_its_own_data():
    config = ESConfig(population_size=6, rank=1, sigma=0.1)
    strategy = Strategy(fitness, config, x_per_member=True)
    state, x = strategy.init(params()), normal(6, 5, 4)
    addresses = strategy.ask(state)
    expected = jax.vmap(lambda address, own: strategy.apply(state.params, own, address))(addresses, x)
    np.testing.assert_allclose(strategy.evaluate(state, x), expected, atol=1e-6)


def test_steps_too_small_for_bfloat16_are_not_lost():
    config = ESConfig(population_size=4, rank=1, sigma=0.1, lr=1e-4, fitness_shaping="raw")
    start = {"w": jnp.ones((64, 64), jnp.bfloat16), "fixed": jnp.ones(3, jnp.bfloat16)}
    strategy = Strategy(lambda p, x: jnp.sum(x @ p["w"]), ESConfig(**{**config.to_dict(), "exclude": ("fixed",)}))
    state = strategy.init(start)
    strategy.leaves(start, jnp.ones((1, 64), jnp.bfloat16))
    weights = jnp.array([1.0, -1.0, 0.5, -0.5])
    for _ in range(50):
        state = strategy.tell(state, weights, shaped=True)
    moved = np.asarray(state.masters["w"]) - 1.0
    assert 1e-4 < np.abs(moved).mean() < 1e-2
    np.testing.assert_array_equal(state.params["w"], jnp.asarray(state.masters["w"]).astype(jnp.bfloat16))
    np.testing.assert_array_equal(state.params["fixed"], start["fixed"])


def test_what_is_not_evolved_stays_whatever_the_optimizer():
    config = ESConfig(population_size=4, optimizer="adamw", weight_decay=0.5, lr=0.1, exclude=("b",))
    strategy, x = Strategy(fitness, config), normal(5, 4)
    state, _ = strategy.step(strategy.init(params() | {"b": jnp.ones(3)}), x)
    np.testing.assert_array_equal(state.params["b"], np.ones(3))
    assert not np.allclose(state.params["w1"], params()["w1"])


SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, {folder!r})
from eggroll.core.config import ESConfig
from eggroll.jax.strategy import Strategy
from test_strategy import fitness, normal, params
devices = jax.devices()
assert len(devices) == 4
x = normal(5, 4)
config = ESConfig(population_size=16, sigma=0.1, lr=0.1, rank=2, optimizer="adam")
results = []
# Two members in each forward, whatever the number of devices: XLA compiles another loop for another number of members,
# which may round the last bit differently (it does with AVX2, not with AVX-512).
for count, per_member in ((1, False), (2, False), (4, False), (4, True)):
    strategy = Strategy(fitness, config, devices=devices[:count], x_per_member=per_member, members_per_forward=2)
    state = strategy.init(params())
    data = jnp.broadcast_to(x, (16, *x.shape)) if per_member else x
    for _ in range(3):
        scores = strategy.evaluate(state, data)
        state = strategy.tell(state, scores)
    results.append((np.asarray(scores), jax.tree.map(np.asarray, state.params)))
for scores, trained in results[1:]:
    np.testing.assert_array_equal(scores, results[0][0])
    jax.tree.map(np.testing.assert_array_equal, trained, results[0][1])
print("equal")
"""


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    code = SHARDED.format(folder=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


def test_a_population_that_devices_cannot_share():
    text = r"population_size \(=10\) makes 5 pairs, which 2 devices cannot share evenly; use 8 or 12, or fewer devices"
    with pytest.raises(ConfigError, match=text):
        Strategy(fitness, ESConfig(population_size=10), devices=[0, 1])


def test_wrong_fitness():
    strategy = Strategy(fitness, ESConfig(population_size=4))
    state = strategy.init(params())
    with pytest.raises(ConfigError, match=r"fitness has shape \(3,\); tell needs one score for each of the 4 members"):
        strategy.tell(state, jnp.zeros(3))
    with pytest.raises(ConfigError, match="evaluate a generation first"):
        strategy.tell(state, jnp.zeros(4))
    rows = Strategy(lambda p, x: x @ p["w1"], ESConfig(population_size=4))
    with pytest.raises(ConfigError, match=r"the fitness function gave shape \(5, 8\); it must give one number"):
        rows.evaluate(rows.init(params()), normal(5, 4))


def test_specs_of_leaves_merge_axes():
    assert Leaf("q", (6, 2, 4), 0, 1).spec == ParameterSpec("q", (6, 8), "matrix")
    assert Leaf("e", (2, 3, 4, 5), 1, 2).spec == ParameterSpec("e", (2, 12, 5), "experts")
