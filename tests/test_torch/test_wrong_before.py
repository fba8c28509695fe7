"""Models whose members were silently wrong in rows: refused in a block, right in ``mode="auto"``."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population


class Model(nn.Module):
    def __init__(self, function, **extra):
        super().__init__()
        self.l, self.function = nn.Linear(6, 6), function
        for name, make in extra.items():
            setattr(self, name, make(self))

    def forward(self, x):
        return self.function(self, x)


def each_alone(population, x, weights_of, generation):
    """What the plain model gives with the plain weights of each member."""
    return [
        torch.func.functional_call(population.model, weights_of(population, p, generation), part)
        for p, part in enumerate(x.chunk(population.population_size))
    ]


def by_member(population, x, generation):
    got = population.forward(x, generation=generation)
    return got.chunk(population.population_size)


def logits_per_image(model, x):
    images, texts = F.normalize(model.l(x), dim=-1), F.normalize(torch.tanh(x), dim=-1)
    return images @ texts.t()


OUTPUTS = {
    "every_row_with_every_other": logits_per_image,
    "mean_over_rows": lambda model, x: model.l(x).mean(0),
    "mean_over_rows_kept": lambda model, x: model.l(x).mean(0, keepdim=True).expand(2, -1),
    "rows_in_the_last_dimension": lambda model, x: model.l(x) @ model.l(x).t(),
    "rows_chosen_by_their_numbers": lambda model, x: x[(model.l(x).mean(-1) > x.mean(-1))],
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("members", [4, 6])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_not_row_by_row(name, members, batch, filled, weights_of):
    model = filled(Model(OUTPUTS[name])).double()
    population = Population(model, population_size=members, sigma=0.3)
    x = torch.randn(members * batch, 6, dtype=torch.float64)
    with pytest.raises(UnsupportedOperationError, match='mode="vmap" or mode="loop"'):  # noqa: SIM117
        with population.perturbed(0) as active:
            active.split(model(x))
    if name == "rows_chosen_by_their_numbers":
        return  # members have outputs of their own sizes
    got = by_member(population, x, 1)
    assert population.mode in ("vmap", "loop")
    for mine, own in zip(got, each_alone(population, x, weights_of, 1), strict=True):
        # what belongs to no row comes once for each member, (members, *shape)
        torch.testing.assert_close(mine.reshape(own.shape), own, rtol=1e-6, atol=1e-6)


def test_split_wants_the_rows_and_not_only_the_members(filled):
    model = filled(Model(lambda model, x: model.l(x)))
    with Population(model, population_size=4).perturbed(0) as active:
        out = model(torch.randn(12, 6))
        assert active.split(out).shape == (4, 3, 6)
        assert active.split(out.flatten()).shape == (4, 18)
        message = r"an output of shape \(4, 6\) does not hold the 12 rows of 4 members"
        with pytest.raises(UnsupportedOperationError, match=message):
            active.split(out[:4])
        model(torch.randn(8, 6))  # an earlier output can still be split
        assert active.split(out).shape == (4, 3, 6)


BYPASSED = {
    "list": dict(ws=lambda model: [model.l.weight]),
    "view": dict(ws=lambda model: [model.l.weight.view(6, 6)]),
    "detached": dict(ws=lambda model: (model.l.weight.detach(),)),
    "flat_part": dict(ws=lambda model: [model.l.weight.data.flatten()[6:30].view(4, 6)]),
}


@pytest.mark.parametrize("mode", ["rows", "vmap", "loop", "auto"])
@pytest.mark.parametrize("name", BYPASSED)
def test_parameters_that_are_used_past_the_members(name, mode, filled):
    """Every member would be the center there; which parameter it is, is said."""
    model = filled(Model(lambda model, x: F.linear(x, model.ws[0]) + model.l.bias.sum(), **BYPASSED[name]))
    population = Population(model, population_size=4, sigma=1.0, mode=mode)
    with pytest.raises(UnsupportedOperationError, match=r"the model uses 'l\.weight' by a reference of its own"):
        population.forward(torch.randn(8, 6), generation=0)
    excluded = Population(model, population_size=4, sigma=1.0, mode=mode, exclude=["l.weight"])
    assert excluded.forward(torch.randn(8, 6), generation=0).shape[0] == 8


class Biased(nn.Linear):
    """A layer that keeps its first weight: caches are made from weights that may change later."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = self.weight.detach().clone()
        return F.linear(x, self.kept, self.bias)


def test_parameters_without_a_use_are_named(filled):
    """A cache that the center filled before stays; that its parameter has no influence is said once."""
    model = filled(nn.Sequential(Biased(6, 6), nn.Linear(6, 2)))
    model(torch.randn(2, 6))
    population = Population(model, population_size=4)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with population.perturbed(0):
                model(torch.randn(8, 6))
        texts = [str(warning.message) for warning in told]
        assert len(texts) == (1 if _ == 0 else 0)
        assert all(text.startswith("1 of 4 perturbed parameters ('0.weight') are not used by the") for text in texts)


def test_parts_that_are_not_called_are_no_reason_to_warn(filled):
    model = filled(Model(lambda model, x: model.l(x), other=lambda model: nn.Linear(6, 6)))
    with warnings.catch_warnings(), Population(model, population_size=4).perturbed(0):
        warnings.simplefilter("error")
        model(torch.randn(8, 6))


READS = {
    "mean_of_a_product": lambda m, x: m.l(x) * (2.0 if m.l(x).mean() > 0 else -1.0),
    "mean_of_the_input": lambda m, x: m.l(x) * (2.0 if x.mean() > 0 else -1.0),
    "any": lambda m, x: m.l(x) * (2.0 if (m.l(x) > 0.5).any() else -1.0),
    "all_negated": lambda m, x: m.l(x) * (2.0 if not (m.l(x) > -30.0).all() else -1.0),
    "item": lambda m, x: m.l(x) / m.l(x).abs().max().item(),
    "tolist": lambda m, x: m.l(x) * m.l(x).mean(0).tolist()[0],
    "float": lambda m, x: m.l(x) + float(x.std()),
    "equal": lambda m, x: m.l(x) * (2.0 if torch.allclose(m.l(x), x, atol=1.0) else 1.0),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", READS)
def test_models_that_go_on_by_a_number_of_the_batch(name, seed, filled, weights_of):
    torch.manual_seed(seed)
    model = filled(Model(READS[name])).double()
    population = Population(model, population_size=4, sigma=0.3)
    x = torch.randn(8, 6, dtype=torch.float64)
    with pytest.raises(UnsupportedOperationError), population.perturbed(0):
        model(x)
    got = by_member(population, x, 1)
    assert population.mode in ("vmap", "loop")  # vmap where all members decide alike
    for mine, own in zip(got, each_alone(population, x, weights_of, 1), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-6)


def _checked(model, x):
    if torch.isnan(x).any() or not (x.abs() < 1e4).all():
        raise ValueError("no numbers")
    return model.l(x)


def _clamped(model, x):
    y = model.l(x)
    return torch.nan_to_num(y) if not torch.isfinite(y).all() else y


ALLOWED = {
    "checks_of_inputs": _checked,
    "clamped_where_infinite": _clamped,
    "a_constant": lambda m, x: m.l(x) * (2.0 if m.table.mean() > 0 else 1.0) * m.table[0].item(),
    "a_mask": lambda m, x: m.l(x) if (x[:, :1] == x[:, :1]).to(torch.int).bool().all() else x,
    "told_only": lambda m, x: (m.__dict__.__setitem__("norm", m.l(x).norm().item()), m.l(x))[1],
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_numbers_that_decide_nothing_are_fine(name, filled):
    model = filled(Model(ALLOWED[name]))
    model.register_buffer("table", torch.tensor([0.5, 1.0]))
    population = Population(model, population_size=4, sigma=0.1, mode="rows")
    assert population.verify(torch.randn(8, 6)) < 1e-5


def _mixes(x):
    return x - x.mean(0)


MIXING = {
    "noise": lambda m, x: _mixes(m.l(x)) + 0.0 * torch.rand(6, dtype=x.dtype),
    "noise_of_rows": lambda m, x: _mixes(m.l(x)) + 0.1 * torch.randn_like(x),
    "a_permutation": lambda m, x: m.l(x)[torch.randperm(len(x))],
}


@pytest.mark.parametrize("name", MIXING)
def test_models_that_draw_and_mix_are_refused(name, filled):
    model = filled(Model(MIXING[name])).double()
    with pytest.raises(UnsupportedOperationError), Population(model, population_size=4, sigma=0.3).perturbed(0):
        model(torch.randn(8, 6, dtype=torch.float64))


@pytest.mark.parametrize("part", ["model", "l"])
def test_an_instance_with_a_forward_of_its_own_is_checked(part, filled, weights_of):
    model = filled(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))).double()
    module = model if part == "model" else model[0]
    original = module.forward
    module.forward = lambda x: _mixes(original(x))  # as accelerate and other wrappers do
    population = Population(model, population_size=4, sigma=0.3)
    x = torch.randn(8, 6, dtype=torch.float64)
    with pytest.raises(UnsupportedOperationError, match="mixes the rows"), population.perturbed(0):
        model(x)
    got = by_member(population, x, 1)
    for mine, own in zip(got, each_alone(population, x, weights_of, 1), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-6)


DRAWS = {
    "of_rows": lambda m, x: m.l(x) + torch.randn_like(x),
    "in_place": lambda m, x: m.l(x) + torch.empty_like(x).uniform_(),
    "by_size": lambda m, x: m.l(x) + torch.rand(len(x), 1, dtype=x.dtype),
    "dropout": lambda m, x: F.dropout(m.l(x), 0.5, training=True),
    "chosen": lambda m, x: m.l(x) + torch.multinomial(x.softmax(-1), 1),
    "for_all_rows": lambda m, x: m.l(x) + torch.rand(6, dtype=x.dtype),
    "python": lambda m, x: m.l(x) * random.random(),
    "numpy": lambda m, x: m.l(x) * float(np.random.rand()),  # noqa: NPY002
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_each_members_own(name, filled):
    """The same in every mode and part, whoever was evaluated before, and nothing is taken from the global sources."""
    model = filled(Model(DRAWS[name])).double()
    x = torch.zeros(8, 6, dtype=torch.float64)

    def population(mode="auto"):
        return Population(model, population_size=4, sigma=0.0, mode=mode)

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = population()
    got = first.forward(x, generation=0)
    assert first.mode == ("loop" if name in ("for_all_rows", "python", "numpy") else "rows")
    torch.manual_seed(9)
    assert torch.equal(first.forward(x, generation=0), got)
    assert not torch.equal(first.forward(x, generation=1), got)
    torch.testing.assert_close(population("loop").forward(x, generation=0), got)
    part = first.forward(x[4:], generation=0, members=range(2, 4))
    torch.testing.assert_close(part, got[4:])
    with population().member(0, 3) as alone:
        torch.testing.assert_close(alone(x[6:]), got[6:])
    parts = got.chunk(4)
    assert not any(torch.equal(parts[0], other) for other in parts[1:])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
