"""A replica: records in, weights out, equal to the oracle and to every other replica."""

import numpy as np
import pytest
import torch
from torch import nn

from eggroll.core import oracle
from eggroll.core.config import ESConfig
from eggroll.core.fitness import shape_fitness
from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError, ConfigError, SelectionError
from eggroll.run.run_dir import RunDir
from eggroll.torch import Population, Replica
from eggroll.torch import noise as noise_module

KINDS = ("matrix", "embedding", "conv", "experts", "vector", "other")


class Everything(nn.Module):
    """One parameter of each kind, two of them tied."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))
        return self.head(self.linear(x) + (x.unsqueeze(1) @ self.experts).sum(1))


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Everything().eval()


def make(model, **settings):
    return Replica(
        model, ESConfig(**{"population_size": 8, "rank": 2, "lr": 0.1, "sigma": 0.1, **settings}), kinds=KINDS
    )


def record(generation, size=8, lr=0.1, sampling="antithetic"):
    scores = np.random.default_rng(generation).normal(size=size)
    return UpdateRecord.make(generation, 0.1, lr, shape_fitness(scores, sampling=sampling))


def evolved(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("sampling", ["antithetic", "one_sided"])
@pytest.mark.parametrize("noise_reuse", [1, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_plain_sgd_equals_the_oracle(model, sampling, noise_reuse, rank):
    replica = make(model, sampling=sampling, noise_reuse=noise_reuse, rank=rank)
    expected = {name: parameter.double().numpy() for name, parameter in evolved(model).items()}
    specs = replica.population.specs
    assert sorted(spec.kind for spec in specs) == [
        "conv", "embedding", "experts", "matrix", "vector", "vector", "vector", "vector"
    ]  # fmt: skip
    for generation in range(4):
        one = record(generation, lr=0.1 * 0.9**generation, sampling=sampling)
        norm = replica.apply(one)
        before = expected
        expected = oracle.sgd_step(
            expected, specs, one.weights, lr=one.lr, rank=rank, seed=42, generation=generation,
            antithetic=sampling == "antithetic", noise_reuse=noise_reuse,
        )  # fmt: skip
        squares = sum(float(((expected[spec.name] - before[spec.name]) ** 2).sum()) for spec in specs)
        assert norm == pytest.approx(squares**0.5, rel=1e-4)
    for name, parameter in evolved(model).items():
        difference = np.abs(parameter.double().numpy() - expected[name]).max()
        assert difference <= 1e-6 * np.abs(expected[name]).max(), name
    assert model.head.weight is model.embed.weight


def test_adam_on_the_oracles_gradient(model):
    """torch.optim.Adam in float64, fed with the oracle's gradients."""
    replica = make(model, optimizer="adam")
    by_hand = {
        spec.name: replica.population.parameter(spec.name).detach().double() for spec in replica.population.specs
    }
    rule = torch.optim.Adam(by_hand.values(), lr=0.1, maximize=True)
    for generation in range(3):
        one = record(generation)
        replica.apply(one)
        for spec in replica.population.specs:
            estimate = oracle.es_gradient(spec, one.weights, rank=2, seed=42, generation=generation)
            by_hand[spec.name].grad = torch.from_numpy(estimate)
        rule.step()
    for name, expected in by_hand.items():
        np.testing.assert_allclose(replica.population.parameter(name).detach().double(), expected, rtol=2e-5, atol=2e-6)


def test_replicas_agree_bit_for_bit(model):
    """With noise kept from an evaluation, without, and after an evaluation by other ranges of members."""
    torch.manual_seed(3)
    other = Everything().eval()
    one, two = make(model, optimizer="momentum"), make(other, optimizer="momentum")
    two.population.noise.cache_bytes = 0
    ids = torch.arange(8).view(2, 4)
    for generation in range(3):
        one.population.noise.prepare(generation, 4, torch.device("cpu"))
        for members in (range(0, 2), range(2, 8)):
            with torch.no_grad(), one.population.perturbed(generation, members) as active:
                model(active.expand(ids))
        assert one.apply(record(generation)) == two.apply(record(generation))
    for name, parameter in evolved(model).items():
        assert parameter.equal(evolved(other)[name])


def test_small_chunks_change_the_order_of_the_sum_only(model, monkeypatch):
    torch.manual_seed(3)
    other = Everything().eval()
    make(model).apply(record(0))
    monkeypatch.setattr(noise_module, "CHUNK_BYTES", 1)
    make(other).apply(record(0))
    for name, parameter in evolved(model).items():
        torch.testing.assert_close(parameter, evolved(other)[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_checkpoint_continues_bit_for_bit(model, tmp_path, dtype, optimizer):
    model = model.to(dtype)
    torch.manual_seed(3)
    other = Everything().eval().to(dtype)
    one = make(model, optimizer=optimizer)
    for generation in range(2):
        one.apply(record(generation))
    RunDir.create(tmp_path / "run", {}).save_checkpoint(2, one.state_tensors(), {})
    for generation in (2, 3):
        one.apply(record(generation))
    two = make(other, optimizer=optimizer)
    two.load_state_tensors(RunDir.open(tmp_path / "run").latest_checkpoint().load())
    for generation in (2, 3):
        two.apply(record(generation))
    assert all(parameter.equal(evolved(other)[name]) for name, parameter in evolved(model).items())
    mine, theirs = one.state_tensors(), two.state_tensors()
    assert sorted(mine) == sorted(theirs)
    assert all(mine[name].equal(theirs[name]) for name in mine)


def test_checkpoints_of_another_model(model):
    replica = make(model)
    tensors = replica.state_tensors()
    del tensors["parameter/conv.weight"]
    tensors["parameter/linear.weight"] = torch.zeros(3, 3)
    before = evolved(model)
    with pytest.raises(CheckpointError) as caught:
        replica.load_state_tensors(tensors)
    assert str(caught.value) == (
        "the checkpoint does not fit this model: conv.weight is missing; linear.weight is (3, 3), the model has (6, 6)"
    )
    assert all(parameter.equal(before[name]) for name, parameter in evolved(model).items())


def test_records_of_another_population(model):
    replica, before = make(model), evolved(model)
    with pytest.raises(ConfigError) as caught:
        replica.apply(record(0, size=6))
    assert str(caught.value) == "the record of generation 0 has 6 members, the population has 8"
    assert all(parameter.equal(before[name]) for name, parameter in evolved(model).items())


def test_what_is_not_selected_stays(model):
    replica = Replica(model, ESConfig(population_size=4, lr=1.0, target_modules=("linear",)))
    before = evolved(model)
    replica.apply(record(0, size=4))
    changed = {name for name, parameter in evolved(model).items() if not parameter.equal(before[name])}
    assert changed == {"linear.weight", "linear.bias"}
    with pytest.raises(
        SelectionError, match=r"target_modules pattern 'liner' matches no parameter. Near matches: linear"
    ):
        Replica(model, ESConfig(population_size=4, target_modules=("liner",)))


def test_an_optimizer_of_ones_own(model):
    replica = Replica(
        model, ESConfig(population_size=8), factory=lambda params: torch.optim.Adagrad(params, lr=0.1, maximize=True)
    )
    before = evolved(model)
    assert replica.apply(record(0)) > 0
    assert not model.linear.weight.equal(before["linear.weight"])


def test_evolution_climbs_a_quadratic():
    """From the origin to a hidden matrix, by scores alone: the distance falls to a twentieth."""
    torch.manual_seed(0)
    target, layer = torch.randn(6, 5), nn.Linear(5, 6, bias=False)
    nn.init.zeros_(layer.weight)
    settings = ESConfig(population_size=64, rank=1, sigma=0.1, lr=2.0, generations=150, lr_schedule="linear")
    replica = Replica(layer, settings)
    eye = torch.eye(5)
    for generation in range(150):
        with torch.no_grad(), replica.population.perturbed(generation) as active:
            outputs = active.split(layer(active.expand(eye)))
        scores = -(outputs - target.T).square().sum((1, 2)).numpy()
        weights = shape_fitness(scores, method="normalized")
        replica.apply(UpdateRecord.make(generation, 0.1, settings.lr_at(generation) / 20, weights))
    assert (layer.weight - target).norm() < 0.05 * target.norm()


def test_public_names():
    import eggroll.torch

    assert dir(eggroll.torch) == ["EGGROLL", "Population", "Replica"]
    assert eggroll.torch.Population is Population
    with pytest.raises(AttributeError, match=r"module 'eggroll.torch' has no attribute 'Populations'"):
        _ = eggroll.torch.Populations
