"""Scales that are perturbed and moved: every member against its written-out weights, and steps against the formula."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.core.address import draw_keys
from eggroll.core.config import ESConfig
from eggroll.core.threefry import normal
from eggroll.errors import CheckpointError, ConfigError, UnsupportedOperationError
from eggroll.torch import Population, Replica
from eggroll.torch.quantized.adopt import grids
from eggroll.torch.quantized.scales import CLIP, ScalesUpdater, clipped
from eggroll.torch.quantized.tensor import as_parameter
from tests.quantized_grids import FORMATS, MAKERS, PlainGrid, quantized_model

SIGMA, SEED = 0.2, 7


def population_of(model, **changes):
    settings = {"population_size": 6, "sigma": SIGMA, "rank": 2, "seed": SEED, "scales": True, "kinds": ("matrix",)}
    return Population(model, **(settings | changes))


def written_out(model, generation, member, rank):
    """A member's weights in float64 by the noise specification, with the draw of ``<name>.scale``."""
    weights = {}
    for name, grid in grids(model).items():
        (m, n), groups = grid.shape, grid.quanta().shape[1]
        (key,) = draw_keys(SEED, f"{name}.scale", generation, [member // 2])
        draw = normal(key, (groups + m) * rank).reshape(groups + m, rank).astype(np.float64)
        noise = draw[groups:] @ draw[:groups].T / rank**0.5 * (1 - 2 * (member % 2))
        factors = 1 + SIGMA * np.repeat(noise, n // groups, axis=1)
        weights[name] = grid.dequantized().double() * torch.from_numpy(factors)
    return weights


def forward(weights, x):
    x = torch.tanh(x.double() @ weights["0.weight"].T)
    return x @ weights["2.weight"].T


@pytest.mark.parametrize("mode", ["rows", "loop", "vmap", "auto"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_member_is_its_written_out_weights(kind, rank, mode):
    model = quantized_model(kind)
    population = population_of(model, rank=rank, mode=mode)
    x = torch.randn(6 * 4, 32, generator=torch.Generator().manual_seed(0))
    out = population.forward(x, generation=3)
    for member in range(6):
        expected = forward(written_out(model, 3, member, rank), x[4 * member : 4 * member + 4])
        torch.testing.assert_close(out[4 * member : 4 * member + 4].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_one_input_for_all_members_and_sequences(kind):
    model = quantized_model(kind)
    population = population_of(model)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    with population.perturbed(1) as active:
        out = active.split(model(active.expand(x)))
    for member in range(6):
        expected = forward(written_out(model, 1, member, 2), x)
        torch.testing.assert_close(out[member].double(), expected, atol=1e-5, rtol=1e-4)


class Tied(nn.Module):
    """Token and position embeddings, the first tied to the head; positions meet no activation before they are added."""

    def __init__(self, kind, time_major=False):
        super().__init__()
        noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)) * 0.1
        self.tokens, self.places = nn.Embedding(64, 32), nn.Embedding(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.tokens._parameters["weight"] = self.head._parameters["weight"] = as_parameter(MAKERS[kind](noise))
        self.places._parameters["weight"] = as_parameter(MAKERS[kind](noise.flip(0)))

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(x)


@pytest.mark.parametrize("mode", ["rows", "loop"])
@pytest.mark.parametrize("kind", FORMATS)
def test_embeddings_tied_to_the_head(kind, mode):
    model = Tied(kind).eval()
    population = population_of(model, kinds=("embedding", "matrix"), mode=mode)
    ids = torch.randint(64, (6 * 2, 7), generator=torch.Generator().manual_seed(0))
    out = population.forward(ids, generation=0)
    for member in range(6):
        weights, own = written_out(model, 0, member, 2), ids[2 * member : 2 * member + 2]
        x = weights["tokens.weight"][own] + weights["places.weight"][torch.arange(7)]
        expected = x @ weights["tokens.weight"].T
        torch.testing.assert_close(out[2 * member : 2 * member + 2].double(), expected, atol=1e-5, rtol=1e-4)


def test_time_major_layers_and_biases_of_each_member():
    class TimeMajor(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = quantized_model("GGUF Q8_0")
            self.layers[0].bias.data.normal_(generator=torch.Generator().manual_seed(0))

        def forward(self, x):
            return self.layers(x.transpose(0, 1)).transpose(0, 1)

    model = TimeMajor().eval()
    x = torch.randn(6 * 2, 5, 32, generator=torch.Generator().manual_seed(0))
    together = population_of(model, kinds=("matrix", "vector"), mode="rows").forward(x, generation=0)
    alone = population_of(model, kinds=("matrix", "vector"), mode="loop").forward(x, generation=0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert (together[:2] - together[2:4]).abs().max() > 0.01


def test_an_input_without_members_and_one_that_has_only_them():
    class WithConstants(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = quantized_model("GGUF Q4_0")
            self.layers[0].bias.data.normal_(generator=torch.Generator().manual_seed(0))
            for name, shape in (("table", (5, 32)), ("one", (32,))):
                self.register_buffer(name, torch.randn(shape, generator=torch.Generator().manual_seed(1)))

        def forward(self, x):
            return self.layers(x) + self.layers(self.table) * self.layers(self.one)

    model = WithConstants().eval()
    x = torch.randn(6 * 2, 5, 32, generator=torch.Generator().manual_seed(0))
    together, alone = (
        population_of(model, kinds=("matrix", "vector"), mode=mode).forward(x, generation=0)
        for mode in ("rows", "loop")
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_any_other_use_gets_the_members_written_out():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = quantized_model("GGUF Q4_1")

        def forward(self, x):
            return F.linear(x, self.inner[0].weight / self.inner[0].weight.norm(dim=1, keepdim=True))

    model = Norms().eval()
    population = population_of(model, target_modules=["inner.0.weight"], mode="rows")
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    out = population.forward(x, generation=2)
    weight = written_out(model, 2, 4, 2)["inner.0.weight"]
    expected = x[4].double() @ (weight / weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(out[4].double(), expected, atol=1e-5, rtol=1e-4)


def es_config(**changes):
    settings = {"population_size": 6, "rank": 2, "optimizer": "sgd", "lr": 0.05, "seed": SEED}
    return ESConfig(**({"quantized_update": "scales"} | settings | changes))


def state(replica):
    return {name: tensor.clone() for name, tensor in replica.state_tensors().items()}


def train(replica, generations):
    for generation in generations:
        scores = np.random.default_rng(generation).normal(size=replica.config.population_size)
        replica.tell(generation, torch.from_numpy(scores))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_step_multiplies_scales_by_the_estimate_and_leaves_codes_alone(kind):
    model = quantized_model(kind)
    replica = Replica(model, es_config())
    before = {name: (grid.codes(), *grid.scales(), grid.dequantized()) for name, grid in grids(model).items()}
    weights = np.array([0.5, -0.25, 0.1, 0.4, -0.3, 0.2], np.float32)
    norm = replica.update(0, weights, 0.05)
    squares = 0.0
    for name, grid in grids(model).items():
        codes, scales, offsets, numbers = before[name]
        (m, _), groups = grid.shape, scales.shape[1]
        estimate = np.zeros((m, groups))
        for pair in range(3):
            (key,) = draw_keys(SEED, f"{name}.scale", 0, [pair])
            draw = normal(key, (groups + m) * 2).reshape(groups + m, 2).astype(np.float64)
            noise = draw[groups:] @ draw[:groups].T / 2**0.5
            estimate += (weights[2 * pair] - weights[2 * pair + 1]) * noise / 6
        factors = torch.from_numpy(1 + 0.05 * estimate)
        half = 6e-4 if kind.startswith("GGUF") else 1e-6  # scales in float16
        torch.testing.assert_close(grid.scales()[0].double(), scales.double() * factors, rtol=half, atol=0)
        if offsets is not None:
            torch.testing.assert_close(grid.scales()[1].double(), offsets.double() * factors, rtol=half, atol=0)
        assert torch.equal(grid.codes(), codes)
        squares += float((grid.dequantized() - numbers).double().square().sum())
    assert norm == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", FORMATS)
def test_two_replicas_are_equal_and_a_resumed_one_goes_on_bit_for_bit(kind, optimizer):
    config = es_config(optimizer=optimizer)
    straight, other = (Replica(quantized_model(kind), config) for _ in range(2))
    train(straight, range(5))
    train(other, range(5))
    saved = state(straight)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state(other).items())
    resumed = Replica(quantized_model(kind, seed=1), config)  # other weights, then those of the checkpoint
    resumed.load_state_tensors(saved)
    train(straight, range(5, 9))
    train(resumed, range(5, 9))
    first, second = state(straight), state(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for mine, theirs in zip(grids(straight.model).values(), grids(resumed.model).values(), strict=True):
        assert torch.equal(mine.dequantized(), theirs.dequantized())


def test_small_steps_are_not_lost_in_sixteen_bits():
    grid = MAKERS["GGUF Q8_0"](torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    before = grid.scales()[0]
    updater = ScalesUpdater(grid)
    for _ in range(1000):
        updater.step(torch.full(before.shape, 1e-5))  # half a unit of float16 is at least 2.4e-4 of a number
    torch.testing.assert_close(grid.scales()[0] / before, torch.full_like(before, 1.01), rtol=6e-4, atol=0)


def test_scales_keep_their_sign_and_zero_stays_zero():
    class Writable(PlainGrid):
        def scales(self):
            return self.quanta(), None

        def set_scales(self, scales, offsets):
            self.steps.copy_(scales)

    grid = Writable(torch.full((2, 4), 3), torch.tensor([[0.5, -2.0], [0.0, 1.0]]))
    updater = ScalesUpdater(grid)
    for _ in range(3):
        updater.step(torch.full((2, 2), -100.0))
    assert torch.equal(grid.quanta(), torch.tensor([[0.5, -2.0], [0.0, 1.0]]) / 8)


def test_scores_out_of_proportion_are_clipped():
    weights = np.ones(64, np.float32)
    assert np.array_equal(clipped(weights), weights)
    weights[5] = 1e4
    rms = np.sqrt(np.mean(weights.astype(np.float64) ** 2))
    assert clipped(weights)[5] == pytest.approx(CLIP * rms)
    assert np.array_equal(np.delete(clipped(weights), 5), np.delete(weights, 5))


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match=r'weight_decay \(=0.1\) has no meaning with quantized_update="scales"'):
        es_config(weight_decay=0.1)
    with pytest.raises(ConfigError, match="and 'scales' has none; use residual_generations=0"):
        es_config(residual_generations=5, residual_decay=0.9)
    layer = nn.Linear(8, 3, bias=False)
    layer._parameters["weight"] = as_parameter(PlainGrid(torch.zeros(3, 8), torch.ones(3, 2)))
    with pytest.raises(UnsupportedOperationError, match="and those of plain cannot be written; use quantized_update="):
        Replica(layer.eval(), es_config())
    saved = state(Replica(quantized_model("GGUF Q8_0"), es_config(quantized_update="nearest")))
    with pytest.raises(CheckpointError, match="the checkpoint has no scales of the quantized weights"):
        Replica(quantized_model("GGUF Q8_0"), es_config()).load_state_tensors(saved)


@pytest.mark.parametrize("kind", ["GGUF Q8_0", "GGUF Q4_1"])
def test_scales_learn_what_scales_can(kind):
    """A teacher whose groups are louder or softer, by a fifth."""
    layer = quantized_model(kind, (64, 16))[0]
    grid, generator = layer.weight.grid, torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=generator)
    factors = 1 + 0.2 * torch.randn(16, 2, generator=generator)
    y = x @ (grid.dequantized() * factors.repeat_interleave(32, dim=1)).T
    config = es_config(population_size=32, rank=1, sigma=0.05, lr=0.1, fitness_shaping="normalized")
    replica, codes = Replica(layer, config, mode="rows"), grid.codes()
    start = float((layer(x) - y).square().mean())
    for _ in range(100):
        replica.step(lambda model, active: -(active.split(model(active.expand(x))) - y).square().mean(dim=(1, 2)))
    assert float((layer(x) - y).square().mean()) < 0.3 * start
    assert torch.equal(grid.codes(), codes)
