"""A replica: records in, weights out, equal to the oracle and to every other replica."""

import numpy as np
import pytest
import torch
from torch import nn

from eggroll.core import oracle
from eggroll.core.config import ESConfig
from eggroll.core.fitness import shape_fitness
from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError, ConfigError, RewardError, SelectionError
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


def by_hand(replica, score_fn, generation):
    """A generation from its parts: scores at the schedule's sigma, shaped as the config says, as a record."""
    config = replica.config
    scores = replica.population.scores(
        lambda active: score_fn(replica.model, active), generation, sigma=config.sigma_at(generation)
    )
    shaped = shape_fitness(
        scores.double().numpy(), method=config.fitness_shaping, sampling=config.sampling, elite_k=config.elite_k
    )
    sigma, lr = config.sigma_at(generation), config.lr_at(generation)
    return scores, replica.apply(UpdateRecord.make(generation, sigma, lr, shaped))


def far_from_one(model, active):
    y = active.split(model(active.expand(torch.ones(3, 6))))
    return -(y - 1.0).square().mean(dim=(1, 2))


@pytest.mark.parametrize("members_per_forward", [None, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sigma_decay": 0.7, "lr_decay": 0.8, "optimizer": "adam", "fitness_shaping": "normalized"},
        {"sampling": "one_sided", "fitness_shaping": "raw", "noise_reuse": 2},
        {"elite_k": 2},
    ],
)
def test_a_step_is_its_parts(settings, members_per_forward):
    config = ESConfig(population_size=8, rank=2, sigma=0.1, lr=0.1, **settings)
    one, other = (Replica(nn.Linear(6, 2), config) for _ in range(2))
    other.model.load_state_dict(one.model.state_dict())
    for generation in range(3):
        assert one.generation == other.generation == generation
        scores = one.step(far_from_one, members_per_forward=members_per_forward)
        expected, _ = by_hand(other, far_from_one, generation)
        torch.testing.assert_close(scores, expected)
        if members_per_forward is None:
            assert torch.equal(one.model.weight, other.model.weight)
        torch.testing.assert_close(one.model.weight, other.model.weight)


@pytest.mark.parametrize("shape", [(8,), (8, 3)])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.bfloat16()])
def test_tell_takes_what_holds_scores(shape, form):
    torch.manual_seed(1)
    scores = torch.randint(-4, 5, shape).double()
    config = ESConfig(population_size=8, lr=0.1)
    told, applied = (Replica(nn.Linear(6, 2), config) for _ in range(2))
    told.model.load_state_dict(applied.model.state_dict())
    norm = told.tell(5, form(scores))
    assert norm == applied.apply(UpdateRecord.make(5, 0.01, 0.1, shape_fitness(scores.numpy()))) > 0
    assert torch.equal(told.model.weight, applied.model.weight)
    assert told.generation == 6


@pytest.mark.parametrize(
    ("scores", "given"),
    [
        (torch.zeros(7), r"float32 \(7,\)"),
        (np.zeros((8, 2, 2)), r"float64 \(8, 2, 2\)"),
        (1.5, "1.5"),
        (["a"] * 8, "U1"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores, given):
    replica = Replica(nn.Linear(6, 2), ESConfig(population_size=8))
    before = replica.model.weight.clone()
    with pytest.raises(RewardError, match=rf"tell needs \(8,\) scores, one for each member, or.*{given}"):
        replica.tell(0, scores)
    with pytest.raises(RewardError, match=rf"fitness_fn must return \(8,\) scores.*{given}.*active.split"):
        replica.step(lambda model, active: scores)
    assert torch.equal(replica.model.weight, before)
    assert replica.generation == 0


def test_arrays_and_scores_of_prompts_are_put_together_from_parts():
    replica = Replica(nn.Linear(6, 2), ESConfig(population_size=8, sigma=0.1))
    whole = replica.evaluate(lambda model, active: active.split(model(active.expand(torch.eye(6)))).mean(2))
    assert whole.shape == (8, 6)

    def as_array(model, active):
        assert active.members <= 3
        return active.split(model(active.expand(torch.eye(6)))).mean(2).numpy()[:, ::-1]

    parts = replica.evaluate(as_array, members_per_forward=3)
    torch.testing.assert_close(parts, whole.flip(1).double())
    some = replica.evaluate(as_array, members=range(2, 5))
    torch.testing.assert_close(some, parts[2:5])
    assert replica.generation == 0


def test_ask_is_the_coming_generation_at_its_sigma():
    replica = Replica(nn.Linear(6, 2), ESConfig(population_size=8, sigma=0.1, sigma_decay=0.5, lr=0.1))
    replica.step(far_from_one)
    with replica.ask() as active, torch.no_grad():
        asked = far_from_one(replica.model, active)
    with replica.population.perturbed(1, sigma=0.05) as active:
        assert torch.equal(asked, far_from_one(replica.model, active))
    with replica.ask(range(4, 8)) as active:
        assert (active.first, active.members) == (4, 4)
    assert replica.tell(replica.generation, asked) > 0


def test_a_score_that_raises_leaves_everything_as_it_was():
    replica = Replica(nn.Linear(6, 2), ESConfig(population_size=8))
    before = replica.model.weight.clone()

    def fails(model, active):
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        replica.step(fails)
    assert torch.equal(replica.model.weight, before)
    assert replica.generation == 0
    assert replica.step(far_from_one).shape == (8,)


def test_steps_learn():
    """The example of the class: a linear map from its outputs, to a tenth of its error in 100 steps."""
    torch.manual_seed(0)
    replica = Replica(
        nn.Linear(3, 1), ESConfig(population_size=64, rank=1, sigma=0.1, lr=0.1), kinds=("matrix", "vector")
    )
    x = torch.randn(32, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3

    def fitness(model, active):
        return -(active.split(model(active.expand(x))) - y).square().mean(dim=(1, 2))

    first = replica.step(fitness).mean()
    for _ in range(99):
        last = replica.step(fitness).mean()
    assert last > first / 10
    assert replica.generation == 100


def test_public_names():
    import eggroll.torch

    assert dir(eggroll.torch) == eggroll.torch.__all__ == ["Active", "EGGROLL", "Population", "Replica"]
    assert eggroll.torch.Population is Population
    with pytest.raises(AttributeError, match=r"module 'eggroll.torch' has no attribute 'Populations'"):
        _ = eggroll.torch.Populations
