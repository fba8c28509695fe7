"""Every mode on every kind of parameter, against the float64 oracle: each member's outputs, and the update."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.core import oracle
from eggroll.core.config import ESConfig
from eggroll.core.select import KINDS
from eggroll.torch import Population, Replica


class Matrix(nn.Module):
    """Two weights, one of them used as it is and transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden) + (hidden @ self.first.weight)[:, :4]


class Embedding(nn.Module):
    """Gathered rows, and the same weight as the head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)

    def forward(self, ids):
        return F.linear(torch.tanh(self.tokens(ids)), self.tokens.weight)


class Convolution(nn.Module):
    """One and two dimensions, strides and groups."""

    def __init__(self):
        super().__init__()
        self.flat, self.deep = nn.Conv2d(3, 4, 3, stride=2), nn.Conv1d(4, 6, 3, padding=1, groups=2)

    def forward(self, x):
        return self.deep(torch.tanh(self.flat(x)).flatten(2))


class Experts(nn.Module):
    """A mixture that weighs all of its experts."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.Parameter(torch.empty(3, 6, 4))

    def forward(self, x):
        shares = torch.softmax(self.gate(x), -1)
        return torch.einsum("re,erm->rm", shares, torch.bmm(x.expand(3, *x.shape), self.experts))


class Vector(nn.Module):
    """Scales, shifts, a bias and a number."""

    def __init__(self):
        super().__init__()
        self.norm, self.head, self.scale = nn.LayerNorm(6), nn.Linear(6, 4), nn.Parameter(torch.empty(()))

    def forward(self, x):
        return self.head(self.norm(x) * self.scale)


class Other(nn.Module):
    """Learned positions, which are no matrix."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Parameter(torch.empty(1, 5, 6)), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(x + self.positions))


CASES = {
    "matrix": (Matrix, lambda rows: torch.randn(rows, 6)),
    "embedding": (Embedding, lambda rows: torch.randint(0, 11, (rows, 5))),
    "conv": (Convolution, lambda rows: torch.randn(rows, 3, 7, 7)),
    "experts": (Experts, lambda rows: torch.randn(rows, 6)),
    "vector": (Vector, lambda rows: torch.randn(rows, 6)),
    "other": (Other, lambda rows: torch.randn(rows, 5, 6)),
}
SETTINGS = [
    {"antithetic": True, "rank": 1, "noise_reuse": 1},
    {"antithetic": True, "rank": 3, "noise_reuse": 2},
    {"antithetic": False, "rank": 2, "noise_reuse": 1},
]
SIZE = 4


def test_the_table_has_every_kind():
    assert tuple(CASES) == KINDS


def made(kind, filled):
    build, inputs = CASES[kind]
    x = inputs(3 * SIZE)
    return filled(build()).double(), x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["rows", "vmap", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_members_are_those_of_the_oracle(kind, mode, settings, filled, weights_of):
    model, x = made(kind, filled)
    population = Population(model, population_size=SIZE, sigma=0.1, mode=mode, kinds=(kind,), **settings)
    assert {spec.kind for spec in population.specs} == {kind}
    for generation in (0, 3):
        got = population.forward(x, generation=generation)
        for p, (part, mine) in enumerate(zip(x.chunk(SIZE), got.chunk(SIZE), strict=True)):
            expected = torch.func.functional_call(model, weights_of(population, p, generation), part)
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
            assert not torch.allclose(mine, model(part), rtol=1e-3), "the member is not the center"


@pytest.mark.parametrize("members", [range(0, 4), range(1, 3), range(3, 4)], ids=str)
@pytest.mark.parametrize("mode", ["rows", "vmap", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_range_of_members_is_a_part_of_the_population(kind, mode, members, filled):
    model, x = made(kind, filled)
    population = Population(model, population_size=SIZE, sigma=0.1, mode=mode)
    whole = population.forward(x, generation=1)
    part = slice(3 * members.start, 3 * members.stop)
    got = population.forward(x[part], generation=1, members=members)
    torch.testing.assert_close(got, whole[part], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_the_oracle(kind, settings, filled):
    model, _ = made(kind, filled)
    config = ESConfig(population_size=SIZE, lr=0.3, sigma=0.1, **settings)
    replica = Replica(model, config, kinds=(kind,))
    expected = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    for generation in range(3):
        scores = np.random.default_rng(generation).normal(size=SIZE)
        replica.tell(generation, scores)
        expected = oracle.sgd_step(
            expected, replica.population.specs, config.shape(scores), lr=0.3, seed=config.seed, generation=generation,
            **settings,
        )  # fmt: skip
    for name, value in model.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6)
