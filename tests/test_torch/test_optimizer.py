"""EGGROLL, the optimizer-shaped trainer: its update against the oracle, its settings, its states and its errors."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from eggroll.core import oracle
from eggroll.core.fitness import VARIANCE_EPSILON, NonFiniteFitnessWarning
from eggroll.errors import CheckpointError, ConfigError, RewardError, UnsupportedOperationError
from eggroll.torch import EGGROLL
from eggroll.torch.parameters import parameter_specs


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).eval()


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


X, TARGET = torch.linspace(-1, 1, 24).view(6, 4), torch.tensor([[0.5, -0.5]] * 6)


def score(model):
    return -(model(X) - TARGET).square().mean()


def trainer(model, *, batched=False, **settings):
    opt = EGGROLL(
        model.parameters(),
        model=model,
        fitness_fn=lambda m: -(opt.split(m(opt.expand(X))) - TARGET).square().mean((1, 2)) if batched else score(m),
        batched=batched,
        **{"population_size": 8, "sigma": 0.1, "learning_rate": 0.05, "rank": 2, **settings},
    )
    return opt


def zscores(fitness, group=0):
    groups = np.asarray(fitness, dtype=np.float64).reshape(-1, group or len(fitness))
    shaped = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + VARIANCE_EPSILON)
    return shaped.reshape(-1)


@pytest.mark.parametrize(
    ("noise_reuse", "antithetic", "draws", "signs"),
    [
        (0, False, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1] * 12),
        (1, False, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1] * 12),
        (2, True, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], [1, -1] * 6),
        (3, True, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [1, -1, 1] * 4),
        (4, True, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [1, -1] * 6),
        (12, True, [0] * 12, [1, -1] * 6),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_a_step_is_that_of_the_oracle(noise_reuse, antithetic, draws, signs, batched):
    """Which draw each evaluation has and with which sign, its score, the z-scores and the step: all from float64."""
    model = small()
    start, specs = weights(model), parameter_specs(model)
    opt = trainer(model, batched=batched, population_size=12, noise_reuse=noise_reuse, learning_rate=0.3)
    mean = opt.step()
    # One-sided member 2 d of an antithetic population has the draw d with the sign +.
    noise = {
        (spec.name, draw): oracle.perturbation(spec, draw, rank=2, seed=42, generation=0, antithetic=False)
        for spec in specs
        for draw in set(draws)
    }
    fitness = []
    for draw, sign in zip(draws, signs, strict=True):
        member = {n: v.double() + 0.1 * sign * torch.from_numpy(noise[n, draw]) for n, v in start.items()}
        y = torch.func.functional_call(copy.deepcopy(model).double(), member, (X.double(),))
        fitness.append(-(y - TARGET).square().mean().item())
    np.testing.assert_allclose(opt.fitness, fitness, rtol=1e-5)
    assert mean == pytest.approx(np.mean(fitness), rel=1e-5)
    shaped = zscores(fitness)
    for spec in specs:
        step = sum(s * sign * noise[spec.name, draw] for s, sign, draw in zip(shaped, signs, draws, strict=True)) / 12
        moved = (dict(model.named_parameters())[spec.name].detach() - start[spec.name]).numpy()
        np.testing.assert_allclose(moved, 0.3 * step, atol=2e-5)
    assert antithetic == opt.population.antithetic


@pytest.mark.parametrize("noise_reuse", [0, 2, 3, 4])
@pytest.mark.parametrize("batch_members", [1, 2, 4, 6])
def test_a_step_in_parts_is_the_step(noise_reuse, batch_members):
    """Every score is credited to its own member, also where parts of members cut through a draw's evaluations."""
    together, apart = small(), small()
    settings = {"batched": True, "population_size": 12, "noise_reuse": noise_reuse}
    one, other = trainer(together, **settings), trainer(apart, **settings, batch_members=batch_members)
    for _ in range(2):
        one.step()
        other.step()
        np.testing.assert_allclose(one.fitness, other.fitness, rtol=1e-5)
    for name, value in weights(together).items():
        torch.testing.assert_close(value, weights(apart)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group_size", [0, 4])
def test_normalization_within_groups(group_size):
    """Fitness is centered and scaled within each group of members."""
    together, apart = small(), small()
    one = trainer(together, batched=True, group_size=group_size, noise_reuse=2)
    other = trainer(apart, group_size=group_size, noise_reuse=2)
    for _ in range(2):
        one.step()
        other.step()
    for name, value in weights(together).items():
        torch.testing.assert_close(value, weights(apart)[name], rtol=1e-5, atol=1e-6)
    shaped = zscores(one.fitness, group_size)
    centered = shaped.reshape(-1, group_size or 8).mean(1)
    assert np.abs(centered).max() < 1e-12
    if group_size:
        assert not np.allclose(shaped, zscores(one.fitness))


def test_one_by_one_and_batched_are_the_same_run():
    models = [small(), small()]
    opts = [trainer(models[0], noise_reuse=2), trainer(models[1], noise_reuse=2, batched=True)]
    for _ in range(3):
        assert opts[0].step() == pytest.approx(opts[1].step(), rel=1e-5)
    for name, value in weights(models[0]).items():
        torch.testing.assert_close(value, weights(models[1])[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("noise_reuse", [0, 2, 4])
def test_it_learns(noise_reuse):
    """From an error of at least 0.3 to below a twentieth of it in 60 steps of 32 evaluations."""
    model = small()
    before = score(model).item()
    opt = trainer(model, batched=True, population_size=32, noise_reuse=noise_reuse)
    for _ in range(60):
        opt.step()
    assert before < -0.3
    assert score(model).item() > before / 20


def test_freeze_nonlora_leaves_vectors_alone():
    model = small()
    start = weights(model)
    trainer(model, freeze_nonlora=True).step()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert changed == {"0.weight", "3.weight"}
    trainer(model, freeze_nonlora=False).step()
    assert {name for name, value in weights(model).items() if not torch.equal(value, start[name])} == set(start)


def test_groups_have_learning_rates_of_their_own_and_schedulers_work():
    model = small()
    start = weights(model)
    opt = EGGROLL(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters()}],
        model=model, fitness_fn=score, population_size=4, learning_rate=0.1,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.0)
    opt.step()
    first = weights(model)
    assert torch.equal(first["0.weight"], start["0.weight"])
    assert not torch.equal(first["3.weight"], start["3.weight"])
    assert torch.equal(first["2.weight"], start["2.weight"]), "parameters that are not given are not evolved"
    scheduler.step()
    opt.step()
    assert same(first, weights(model)), "the scheduler has set every learning rate to 0"
    assert opt.generation == 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam", lambda p: torch.optim.SGD(p, lr=1, momentum=0.5, maximize=True)])
def test_a_run_continues_from_its_state(optimizer, tmp_path):
    def begin():
        model = small()
        return model, trainer(model, optimizer=optimizer)

    model, opt = begin()
    opt.sigma = 0.07
    for _ in range(4):
        opt.step()
    again, resumed = begin()
    half, first = begin()
    first.sigma = 0.07
    for _ in range(2):
        first.step()
    state = copy.deepcopy((half.state_dict(), first.state_dict()))
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    assert (resumed.generation, resumed.sigma) == (2, 0.07)
    for _ in range(2):
        resumed.step()
    assert same(weights(model), weights(again))


def test_a_state_from_before_the_first_step_has_no_memory_of_later_ones():
    model = small()
    opt = trainer(model, optimizer="momentum")
    state, start = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    opt.step()
    first = weights(model)
    model.load_state_dict(start)
    opt.load_state_dict(state)
    opt.step()
    assert same(first, weights(model))


def test_a_state_survives_a_file_that_holds_only_data(tmp_path):
    model = small()
    opt = trainer(model, optimizer="adam")
    opt.step()
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    start = weights(model)
    opt.step()
    again = small()
    again.load_state_dict(start)
    other = trainer(again, optimizer="adam")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.step()
    assert same(weights(model), weights(again))


@pytest.mark.parametrize("change", [{"seed": 7}, {"population_size": 16}, {"optimizer": "adam"}, {"noise_reuse": 2}])
def test_a_state_of_other_settings_is_refused(change):
    state = trainer(small()).state_dict()
    with pytest.raises(CheckpointError, match=f"with other settings.*{next(iter(change))}="):
        trainer(small(), **change).load_state_dict(state)


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.double(),
        lambda model: nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()), model.parameters()
        ),
    ],
)
def test_parameters_whose_memory_was_replaced_are_noticed(replace):
    model = small()
    opt = trainer(model)
    opt.fitness_fn = lambda m: float(m[0].weight.sum())
    with torch.no_grad():
        replace(model)
    with pytest.raises(
        ConfigError, match=r"the memory of parameter '0.weight' was replaced since the optimizer was made"
    ):
        opt.step()


def test_weights_loaded_into_a_model_in_16_bit_reach_the_masters():
    model = small().bfloat16()
    opt = EGGROLL(model.parameters(), model=model, fitness_fn=lambda m: 0.0, population_size=4, learning_rate=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    opt.step()
    assert all((parameter == 7.0).all() for parameter in model.parameters())


def test_an_exception_leaves_everything_as_it_was():
    model = small()
    start = weights(model)
    calls = itertools.count()

    def fails(m):
        if next(calls) == 3:
            raise KeyError("a user's mistake")
        return score(m)

    opt = EGGROLL(model.parameters(), model=model, fitness_fn=fails, population_size=8)
    with pytest.raises(KeyError, match="a user's mistake"):
        opt.step()
    assert same(start, weights(model))
    assert opt.generation == 0
    reference = small()
    EGGROLL(reference.parameters(), model=reference, fitness_fn=score, population_size=8).step()
    opt.step()
    assert same(weights(model), weights(reference))


def test_while_a_member_is_scored_the_model_is_a_plain_one():
    model = small()
    seen = []

    def look(m):
        assert m is model
        seen.append({name: type(value) for name, value in m._modules["0"]._parameters.items()})
        return m[0].weight.sum() + m(X).sum().item()

    EGGROLL(model.parameters(), model=model, fitness_fn=look, population_size=2).step()
    assert seen == [{"weight": torch.Tensor, "bias": torch.Tensor}] * 2


def test_scores_that_are_not_numbers_count_as_the_worst():
    model = small()
    scores = iter([1.0, float("nan"), 2.0, 3.0])
    opt = EGGROLL(model.parameters(), model=model, fitness_fn=lambda _: next(scores), population_size=4)
    with pytest.warns(NonFiniteFitnessWarning, match="1 of 4 scores"):
        assert opt.step() == 2.0
    assert np.isnan(opt.fitness[1])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"noise_reuse": -1}, r"noise_reuse \(=-1\) must be 0 \(a draw for every member\), 2 \(antithetic pairs\)"),
        ({"noise_reuse": 3}, r"population_size \(=8\) must be a multiple of noise_reuse \(=3\).*use 9"),
        ({"population_size": 1}, r"population_size \(=1\) must be at least 2"),
        ({"group_size": 3}, r"group_size \(=3\) must divide population_size \(=8\)"),
        ({"sigma": 0.0, "rank": 0}, "(?s)2 problems.*rank.*sigma"),
        (
            {"optimizer": "adan"},
            r"optimizer \(='adan'\) must be one of: sgd, momentum, adam, adamw; did you mean 'adam'",
        ),
        ({"batch_members": 4}, r"batch_members \(=4\) must divide population_size \(=8\) and needs batched=True"),
        ({"batch_members": 3, "batched": True}, r"batch_members \(=3\) must divide population_size"),
    ],
)
def test_settings_that_cannot_work(settings, text):
    with pytest.raises(ConfigError, match=text):
        trainer(small(), **settings)


@pytest.mark.parametrize("one", [np.array([1.0]), np.array(1.0), torch.tensor([1.0])])
def test_an_array_of_one_number_is_a_score(one):
    opt = trainer(small())
    opt.fitness_fn = lambda m: one
    assert opt.step() == 1.0


def test_numbers_that_are_too_large():
    opt = trainer(small())
    opt.fitness_fn = lambda m: 10**400
    with pytest.raises(RewardError, match="returned a number that is too large for a float"):
        opt.step()


def test_other_mistakes():
    model = small()
    opt = trainer(model)
    with pytest.raises(ConfigError, match=r"that is no parameter of model; pass model.parameters\(\)"):
        EGGROLL(small().parameters(), model=model, fitness_fn=score)
    with pytest.raises(ConfigError, match="step\\(\\) takes no closure"):
        opt.step(lambda: 0.0)
    with pytest.raises(ConfigError, match="expand and split are for use inside fitness_fn"):
        opt.expand(X)
    with pytest.raises(ConfigError, match="parameters cannot be added to an EGGROLL that is made"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(CheckpointError, match="this is no state of EGGROLL"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=1).state_dict())
    opt.fitness_fn = lambda m: m(X)
    with pytest.raises(
        RewardError, match=r"must return one number, it returned a tensor of shape \(6, 2\).*batched=True"
    ):
        opt.step()
    batched = trainer(model, batched=True)
    batched.fitness_fn = lambda m: torch.zeros(3)
    with pytest.raises(RewardError, match=r"must return 8 numbers with batched=True.*float64 \(3,\)"):
        batched.step()
    noisy = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    with pytest.raises(UnsupportedOperationError, match=r"Call model.eval\(\) first"):
        EGGROLL(noisy.parameters(), model=noisy, fitness_fn=score, population_size=4).step()
