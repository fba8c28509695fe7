"""Codes that are moved: nothing is lost between them and the residual, nothing leaves its range, all of it replays."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eggroll.core.config import ESConfig
from eggroll.errors import CheckpointError, ConfigError
from eggroll.torch import Replica
from eggroll.torch.quantized.adopt import grids
from eggroll.torch.quantized.rounding import rounded
from eggroll.torch.quantized.tensor import as_parameter
from eggroll.torch.quantized.threshold import ThresholdUpdater
from eggroll.torch.quantized.update import RESIDUAL_LIMIT, GridRule, GridUpdater
from tests.quantized_grids import FORMATS, PlainGrid, quantized_model

SHAPE = (3, 8)  # two groups of four columns
QUANTA = torch.tensor([[0.5, 2.0], [0.25, 1.0], [4.0, 0.125]])
LR = {"int8": 0.003, "Q8_0": 0.003, "int4": 0.1, "Q4_0": 0.1, "Q4_1": 0.1}
RULES = {
    "error_feedback": {"residual_decay": 0.9},
    "with adam": {"optimizer": "adam"},
    "with decay": {"weight_decay": 0.1},
    "rebuilt": {"residual_decay": 0.9, "residual_generations": 3},
    "nearest": {"quantized_update": "nearest"},
    "threshold": {"quantized_update": "threshold", "move_threshold": 1.5},
}


def plain_grid(code=0, low=-128, high=127, quanta=QUANTA):
    return PlainGrid(torch.full(SHAPE, code), quanta, low, high)


def in_weights(steps, quanta=QUANTA):
    """Steps in quanta as steps of the weights."""
    return steps.float() * quanta.repeat_interleave(4, dim=1)


# Whole multiples of 1/1024 are exact in a float16 residual, which is below 2.
exact_steps = st.lists(
    st.lists(st.integers(-3000, 3000), min_size=24, max_size=24).map(lambda x: torch.tensor(x).view(SHAPE) / 1024),
    min_size=1,
    max_size=20,
)


@settings(max_examples=40, deadline=None)
@given(exact_steps, st.sampled_from(["uniform", "zero"]))
def test_moved_codes_plus_residual_are_the_sum_of_steps_and_the_first_residual(steps, start):
    grid = plain_grid()
    updater = GridUpdater(grid, GridRule(start=start))
    first = updater.residual.double()
    assert bool(first.any()) == (start == "uniform")
    for generation, step in enumerate(steps):
        updater.step(in_weights(step), generation)
        assert updater.residual.abs().max() <= 0.5
    assert torch.equal(grid.codes() + updater.residual.double(), first + sum(steps).double())


def test_residuals_begin_anywhere_within_a_quantum_and_otherwise_for_each_parameter_and_seed():
    shape = (64, 256)

    def first(**given):
        grid = PlainGrid(torch.zeros(shape, dtype=torch.int8), torch.ones(64, 4))
        return GridUpdater(grid, GridRule(**given.pop("rule", {})), **given).residual.double()

    found = first(key=(1, 2))
    assert torch.equal(found, first(key=(1, 2)))
    counts = torch.histc(found.float(), bins=16, min=-0.5, max=0.5)
    assert counts.sum() == found.numel()  # all of them within [-1/2, 1/2)
    assert ((counts - 1024).abs() < 5 * 1024**0.5).all()
    other = first(key=(1, 3))
    assert abs(torch.corrcoef(torch.stack([found.flatten(), other.flatten()]))[0, 1]) < 0.04
    assert not first(key=(1, 2), rule={"start": "zero"}).any()


def test_a_tenth_of_a_quantum_moves_one_code_in_ten_at_once_unless_residuals_begin_at_zero():
    shape, moved = (64, 256), {}
    for start in ("uniform", "zero"):
        grid = PlainGrid(torch.zeros(shape, dtype=torch.int8), torch.ones(64, 4))
        GridUpdater(grid, GridRule(start=start)).step(torch.full(shape, 0.1), 0)
        moved[start] = float(grid.codes().float().mean())
    assert moved["zero"] == 0.0
    assert abs(moved["uniform"] - 0.1) < 4 * (0.09 / 16384) ** 0.5


@settings(max_examples=40, deadline=None)
@given(
    exact_steps,
    st.sampled_from([(-8, 7), (0, 15), (-128, 127)]),
    st.sampled_from(["error_feedback", "nearest", "threshold"]),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.booleans(),
)
def test_codes_stay_in_their_range_and_residuals_within_their_limit(steps, ends, name, decay, at_top):
    low, high = ends
    grid = plain_grid(high if at_top else low, low, high)
    rule = GridRule(name, decay, threshold=0.5)
    updater = (ThresholdUpdater if name == "threshold" else GridUpdater)(grid, rule)
    before = grid.codes().to(torch.int16)
    for generation, step in enumerate(steps):
        updater.step(in_weights(100 * step), generation)
        codes = grid.codes().to(torch.int16)
        assert codes.min() >= low
        assert codes.max() <= high
        if name == "threshold":
            assert (codes - before).abs().max() <= 1
        before = codes
    if name == "error_feedback":
        assert updater.residual.abs().max() <= RESIDUAL_LIMIT


@settings(max_examples=20, deadline=None)
@given(exact_steps, st.sampled_from(["error_feedback", "nearest", "threshold"]))
def test_a_group_that_nothing_can_change_never_moves(steps, name):
    quanta = QUANTA.clone()
    quanta[1, 0] = 0.0
    grid = plain_grid(3, quanta=quanta)
    updater = (ThresholdUpdater if name == "threshold" else GridUpdater)(grid, GridRule(name, threshold=0.5))
    for generation, step in enumerate(steps):
        updater.step(in_weights(step), generation)
    assert torch.all(grid.codes()[1, :4] == 3)
    assert all(torch.isfinite(tensor).all() for tensor in updater.state().values())


def test_the_returned_norm_is_that_of_the_weights_change():
    grid = plain_grid()
    updater = GridUpdater(grid, GridRule())
    for generation in range(5):
        before = grid.dequantized()
        step = 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(generation))
        norm = updater.step(in_weights(step), generation)
        assert norm == pytest.approx(float((grid.dequantized() - before).square().sum()), rel=1e-6)


def test_nearest_loses_what_is_below_half_a_quantum_and_feedback_does_not():
    nearest, feedback = plain_grid(), plain_grid()
    for grid, name in ((nearest, "nearest"), (feedback, "error_feedback")):
        updater = GridUpdater(grid, GridRule(name))
        for generation in range(16):
            updater.step(in_weights(torch.full(SHAPE, 0.4375)), generation)
    assert torch.all(nearest.codes() == 0)
    assert torch.all(feedback.codes() == 7)  # 16 * 0.4375


def test_the_residual_follows_the_published_recursion():
    """e <- decay e + u; move = round(e); e <- e - move, in float64 by hand, within a unit of float16 each time."""
    grid, decay = plain_grid(), 0.9
    updater = GridUpdater(grid, GridRule(decay=decay))
    e, codes = updater.residual.double().numpy(), np.zeros(SHAPE)
    random = np.random.default_rng(0)
    for generation in range(50):
        u = random.normal(size=SHAPE) * 0.3
        e = decay * e + u
        moved = np.rint(e)
        e, codes = e - moved, codes + moved
        updater.step(in_weights(torch.from_numpy(u)), generation)
        np.testing.assert_allclose(updater.residual.double(), e, atol=3e-3)  # 1 / (1 - decay) units at most
    np.testing.assert_array_equal(grid.codes(), codes)


@pytest.mark.parametrize("size", [2e-5, 1e-3, 0.02])
def test_float16_residuals_do_not_drift_over_a_thousand_steps(size):
    """Where 16 bits round to nearest, steps of 2e-5 vanish beside a residual of 0.3: half a unit there is 1.2e-4."""
    grid, shape = PlainGrid(torch.zeros(64, 64), torch.ones(64, 1)), (64, 64)
    updater = GridUpdater(grid, GridRule())
    start = torch.rand(shape, generator=torch.Generator().manual_seed(1)).mul_(0.98).sub_(0.49).half()
    updater.residual.copy_(start)
    steps = size * (0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(2)))
    nearest = start.clone()
    for generation in range(1000):
        updater.step(steps.clone(), generation)
        nearest += steps.half()
    total = grid.codes() + updater.residual.double()
    drift = (total - start.double() - 1000 * steps.double()).abs()
    assert drift.max() < 0.02  # of a quantum
    assert drift.mean() < 1.5e-3
    assert abs((total - start.double()).mean() / (1000 * steps.double()).mean() - 1) < 1e-3  # no side is preferred
    if size == 2e-5:
        unmoved = (start.abs() > 0.25) & (steps < 1e-5 * 1.2)
        assert torch.equal(nearest[unmoved], start[unmoved])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_the_right_mean_and_keeps_what_fits(dtype):
    wide = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    fits = wide.to(dtype)
    assert torch.equal(rounded(fits.float(), dtype, 7), fits)
    unit = torch.finfo(dtype).eps * wide.abs()
    results = torch.stack([rounded(wide.clone(), dtype, generation).double() for generation in range(256)])
    assert ((results - wide).abs() <= unit).all()
    assert (
        (results.mean(0) - wide).abs() <= unit / 32
    ).all()  # of independent draws, one in fifty would be further off
    assert abs((results[0] - wide).mean()) < 2e-2 * unit.mean()  # and over the elements of one generation


def test_threshold_is_the_papers_rule():
    """Moments, z-scores over the weight, one code up or down, in float64 by hand; close calls are left out."""
    shape, rule = (32, 64), GridRule("threshold", threshold=2.0, betas=(0.9, 0.99))
    grid = PlainGrid(torch.zeros(shape), torch.rand(32, 2) + 0.1)
    updater = ThresholdUpdater(grid, rule)
    first, second, codes, sure = (np.zeros(shape) for _ in range(4))
    random = np.random.default_rng(0)
    for generation in range(12):
        g = random.normal(size=shape)
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g**2
        u = (first / (1 - 0.9 ** (generation + 1))) / (np.sqrt(second / (1 - 0.99 ** (generation + 1))) + 1e-8)
        z = (u - u.mean()) / (u.std() + 1e-8)
        codes += np.sign(z) * (np.abs(z) >= 2.0)
        sure += np.abs(np.abs(z) - 2.0) > 0.05
        updater.step(torch.from_numpy(g).float(), generation)
    sure = sure == 12
    assert sure.mean() > 0.3
    np.testing.assert_array_equal(grid.codes().numpy()[sure], codes[sure])
    assert (codes != 0).mean() > 0.02


def test_threshold_moments_decay_in_sixteen_bits():
    """0.999 v differs from v by less than bfloat16 can show: to nearest, v would stay forever."""
    updater = ThresholdUpdater(PlainGrid(torch.zeros(64, 64), torch.ones(64, 1)), GridRule("threshold"))
    updater.second.fill_(1.0)
    for generation in range(1000):
        updater.step(torch.zeros(64, 64), generation)
    assert updater.second.float().mean() == pytest.approx(0.999**1000, rel=0.02)


@pytest.mark.parametrize("generations", [4, 50])
def test_a_rebuilt_residual_is_the_stored_one_cut_off_at_k(generations):
    """Bit for bit: the stored recursion, begun K generations ago from 0, or with the run if that is not so long ago."""
    random = torch.Generator().manual_seed(3)
    steps = [(t, 0.7 * torch.randn(SHAPE, generator=random)) for t in range(12)]
    kept = steps[:-1][-generations:]
    past = lambda: ((t, in_weights(step)) for t, step in kept)  # noqa: E731
    stored = GridUpdater(plain_grid(), GridRule(decay=0.9, start="zero" if generations == 4 else "uniform"))
    for t, step in kept:
        stored.step(in_weights(step), t)
    rebuilt = GridUpdater(PlainGrid(stored.grid.codes(), QUANTA), GridRule(decay=0.9), past)
    t, step = steps[-1]
    assert rebuilt.state() == {}
    assert torch.equal(rebuilt._rebuilt(QUANTA, rebuilt.grid.codes().to(torch.int16)), stored.residual)
    assert stored.step(in_weights(step), t) == rebuilt.step(in_weights(step), t)
    assert torch.equal(stored.grid.codes(), rebuilt.grid.codes())


def test_a_rebuilt_residual_of_the_first_generation_is_what_residuals_begin_with():
    """Also where codes have not moved yet, so that a run with K generations kept begins as one that stores them."""
    stored, rebuilt = GridUpdater(plain_grid(), GridRule(decay=0.9)), plain_grid()
    step = torch.full(SHAPE, 0.3)
    GridUpdater(rebuilt, GridRule(decay=0.9), lambda: iter(())).step(in_weights(step), 0)
    stored.step(in_weights(step), 0)
    assert torch.equal(stored.grid.codes(), rebuilt.codes())
    assert rebuilt.codes().any()


def es_config(kind="GGUF Q8_0", **changes):
    return ESConfig(**{"population_size": 16, "rank": 2, "optimizer": "sgd", "lr": LR[kind.split()[1]]} | changes)


def train(replica, generations):
    for generation in generations:
        scores = np.random.default_rng(generation).normal(size=replica.config.population_size)
        replica.tell(generation, torch.from_numpy(scores))


def state(replica):
    return {name: tensor.clone() for name, tensor in replica.state_tensors().items()}


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", FORMATS)
def test_two_replicas_are_equal_and_a_resumed_one_goes_on_bit_for_bit(kind, rule):
    config = es_config(kind, **RULES[rule])
    straight, other = (Replica(quantized_model(kind), config) for _ in range(2))
    start = {name: grid.codes() for name, grid in grids(straight.model).items()}
    train(straight, range(5))
    train(other, range(5))
    saved = state(straight)
    assert_equal_states(saved, state(other))
    train(straight, range(5, 9))
    resumed = Replica(quantized_model(kind, seed=1), config)  # other weights of the same format and shapes
    for mine, theirs in zip(grids(resumed.model).values(), grids(other.model).values(), strict=True):
        mine.stored.copy_(theirs.stored)  # scales, where they are elsewhere than the codes, are the model's own
        if hasattr(theirs, "weight"):
            mine.weight.scale.copy_(theirs.weight.scale)
    train(resumed, range(2))  # whatever it did before is gone
    resumed.load_state_tensors(saved)
    train(resumed, range(5, 9))
    assert_equal_states(state(straight), state(resumed))
    after = grids(straight.model)
    assert any(not torch.equal(codes, after[name].codes()) for name, codes in start.items())


@pytest.mark.parametrize("kind", FORMATS)
def test_rebuilt_equals_stored_wherever_no_code_meets_an_end(kind):
    stored = Replica(quantized_model(kind), es_config(kind, residual_decay=0.9))
    rebuilt = Replica(quantized_model(kind), es_config(kind, residual_decay=0.9, residual_generations=50))
    compared = moved = 0
    inside = {name: torch.ones(grid.shape, dtype=torch.bool) for name, grid in grids(stored.model).items()}
    start = {name: grid.codes() for name, grid in grids(stored.model).items()}
    for generation in range(8):
        train(stored, [generation])
        train(rebuilt, [generation])
        for name, grid in grids(stored.model).items():
            codes, others = grid.codes().to(torch.int16), grids(rebuilt.model)[name].codes().to(torch.int16)
            inside[name] &= (codes > grid.low + 1) & (codes < grid.high - 1)
            assert torch.equal(codes[inside[name]], others[inside[name]])
            moved += int((codes != start[name]).sum())
            compared += int(inside[name].sum())
    assert compared > 10_000
    assert moved > 500
    assert not [name for name in state(rebuilt) if "residual" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_generations": 50}, "so older ones must be forgotten, and residual_decay (=1) forgets none"),
        (
            {"residual_generations": 50, "residual_decay": 0.9, "optimizer": "adam"},
            'with optimizer="adam" a step depends on more than those; use optimizer="sgd"',
        ),
        (
            {"residual_generations": 50, "residual_decay": 0.9, "weight_decay": 0.1},
            "with weight_decay=0.1 a step depends on more than those",
        ),
        (
            {"residual_generations": 50, "residual_decay": 0.9, "quantized_update": "nearest"},
            "and 'nearest' has none; use residual_generations=0",
        ),
        ({"residual_generations": -1}, "residual_generations (=-1)"),
        ({"quantized_update": "threshold", "weight_decay": 0.1}, "weight_decay (=0.1) has no meaning"),
        ({"move_threshold": 0.0}, "move_threshold (=0.0)"),
        ({"quantized_update": "treshold"}, "did you mean 'threshold'?"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        es_config(**changes)
    assert message in str(caught.value)


def test_an_optimizer_of_ones_own_cannot_be_rebuilt():
    config = es_config(residual_generations=5, residual_decay=0.9)
    with pytest.raises(ConfigError, match="give no optimizer of your own, or use residual_generations=0"):
        Replica(quantized_model("GGUF Q8_0"), config, factory=lambda params: torch.optim.SGD(params, maximize=True))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("error_feedback", "the checkpoint has no residual of the quantized weights"),
        ("threshold", "the checkpoint has no first_moment of the quantized weights"),
        ("rebuilt", "it was written with residual_generations=0; use the same as then"),
    ],
)
def test_a_checkpoint_of_another_rule_is_refused(rule, message):
    saved = state(Replica(quantized_model("GGUF Q8_0"), es_config(quantized_update="nearest")))
    with pytest.raises(CheckpointError, match=message):
        Replica(quantized_model("GGUF Q8_0"), es_config(**RULES[rule])).load_state_tensors(saved)


def test_a_learning_rate_of_zero_moves_nothing():
    replica = Replica(quantized_model("GGUF Q4_0"), es_config(quantized_update="threshold", move_threshold=0.1))
    before = state(replica)
    replica.update(0, np.random.default_rng(0).normal(size=16).astype(np.float32), 0.0)
    assert_equal_states(before, state(replica))


def loss_after(generations, *, seed, quantized=True, **rule):
    """Of an int8 layer whose teacher is two hundredths away, a few quanta; or of the same numbers in float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.1 * torch.randn(8, 64, generator=generator)
    quanta = weights.abs().amax(1, keepdim=True) / 127
    grid = PlainGrid((weights / quanta).round(), quanta)
    center = grid.dequantized()
    layer = nn.Linear(64, 8, bias=False).eval()
    layer._parameters["weight"] = as_parameter(grid) if quantized else nn.Parameter(center.clone(), requires_grad=False)
    x = torch.randn(64, 64, generator=generator)
    y = x @ (center + 0.02 * torch.randn(8, 64, generator=generator)).T
    config = ESConfig(
        population_size=32,
        rank=1,
        sigma=0.02,
        lr=0.003,
        fitness_shaping="normalized",
        optimizer="sgd",
        seed=seed,
        **rule,
    )
    replica = Replica(layer, config, mode="rows")
    for _ in range(generations):
        replica.step(lambda model, active: -(active.split(model(active.expand(x))) - y).square().mean(dim=(1, 2)))
    return float((layer(x) - y).square().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_error_feedback_learns_as_floating_point_does(seed):
    """Steps of a tenth of a quantum: within 1 % on three seeds (docs/dev/log.md); rounded alone they are lost."""
    start, reached = loss_after(0, seed=seed), loss_after(150, seed=seed, quantized=False)
    assert reached < 0.6 * start
    assert loss_after(150, seed=seed) < 1.05 * reached
    forgetting = loss_after(150, seed=seed, residual_decay=0.9)
    assert 1.2 * reached < forgetting < 0.85 * start
    assert loss_after(150, seed=seed, quantized_update="nearest") > 1.5 * reached
