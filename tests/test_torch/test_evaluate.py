"""``Population.forward`` in all its modes, ``verify``, and what a small first call finds out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch import Population


class Model(nn.Module):
    """Two linear layers around a function of ``(model, hidden)``."""

    def __init__(self, function=lambda model, hidden: hidden):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(8, 8), nn.Linear(8, 3), function
        self.register_buffer("table", torch.randn(16, 8))

    def forward(self, x):
        return self.second(self.function(self, torch.tanh(self.first(x))))


class Scores(nn.Module):
    """A loss for each batch and its logits, as Hugging Face models give."""

    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, x, scale=1.0):
        logits = self.model(x) * scale
        return {"loss": logits.square().mean(), "logits": logits, "kind": "scores"}


def mixes(model, x):
    return x - x.mean(0)


def moves(model, x):
    return x[torch.arange(len(x)).flip(0)]


def reads_on_the_host(model, x):
    return x * float(model.first.bias.sum())


def expected(population, x, weights_of, generation):
    parts = x.chunk(population.population_size)
    return torch.cat(
        [
            torch.func.functional_call(population.model, weights_of(population, p, generation), part)
            for p, part in enumerate(parts)
        ]
    )


@pytest.mark.parametrize("mode", ["rows", "vmap", "loop", "auto"])
@pytest.mark.parametrize("options", [dict(population_size=4), dict(population_size=5, antithetic=False, rank=3)])
def test_every_mode_gives_each_member(mode, options, filled, weights_of):
    population = Population(filled(Model()).double(), sigma=0.1, mode=mode, **options)
    x = torch.randn(2 * population.population_size, 8, dtype=torch.float64)
    for generation in (0, 3):
        got = population.forward(x, generation=generation)
        torch.testing.assert_close(got, expected(population, x, weights_of, generation), rtol=1e-6, atol=1e-7)
    assert population.mode == ("rows" if mode == "auto" else mode)


@pytest.mark.parametrize(
    ("function", "mode"),
    [(mixes, "vmap"), (moves, "vmap"), (reads_on_the_host, "loop"), (lambda model, x: x.sort(0)[0], "vmap")],
)
def test_auto_takes_the_first_mode_that_agrees(function, mode, filled, weights_of):
    population = Population(filled(Model(function)).double(), population_size=4, sigma=0.1)
    x = torch.randn(12, 8, dtype=torch.float64)
    got = population.forward(x, generation=1)
    assert population.mode == mode
    torch.testing.assert_close(got, expected(population, x, weights_of, 1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["vmap", "loop", "auto"])
def test_scalar_outputs_become_one_for_each_member(mode, filled):
    model = filled(Scores()).double()
    population = Population(model, population_size=4, sigma=0.1, mode=mode)
    x = torch.randn(8, 8, dtype=torch.float64)
    got = population.forward(x, generation=1, scale=2.0)
    assert got["loss"].shape == (4,)
    assert got["logits"].shape == (8, 3)
    assert got["kind"] == "scores"
    for p in range(4):
        with population.member(1, p):
            assert torch.allclose(got["loss"][p], model(x[2 * p : 2 * p + 2], 2.0)["loss"])


@pytest.mark.parametrize("mode", ["rows", "vmap", "loop"])
def test_inputs_of_another_size_are_the_same_for_all_members(mode, filled, weights_of):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model()

        def forward(self, x, shift):
            return self.inner(x + shift)

    population = Population(filled(Shifted()).double(), population_size=4, sigma=0.1, mode=mode)
    x, shift = torch.randn(8, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    got = population.forward(x, shift, generation=1)
    for p in range(4):
        own = torch.func.functional_call(population.model, weights_of(population, p, 1), (x[2 * p : 2 * p + 2], shift))
        torch.testing.assert_close(got[2 * p : 2 * p + 2], own, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["rows", "vmap", "loop", "auto"])
@pytest.mark.parametrize("time", [3, 4, 8])
def test_time_major_models(mode, time, filled, weights_of):
    model = filled(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))).double()
    population = Population(model, population_size=4, sigma=0.1, mode=mode, batch_dim=1)
    x = torch.randn(time, 8, 6, dtype=torch.float64)
    got = population.forward(x, generation=1)
    for p in range(4):
        rows = slice(2 * p, 2 * p + 2)
        own = torch.func.functional_call(model, weights_of(population, p, 1), x[:, rows])
        torch.testing.assert_close(got[:, rows], own, rtol=1e-6, atol=1e-7)


def test_auto_falls_back_for_later_inputs(filled, weights_of):
    """A model may be fine on the inputs that were checked, and use an operation without a rule on others."""

    def sometimes(model, x):
        return reads_on_the_host(model, x) if len(x) % 3 == 0 else x

    population = Population(filled(Model(sometimes)).double(), population_size=4, sigma=0.1)
    population.forward(torch.randn(8, 8, dtype=torch.float64), generation=0)
    assert population.mode == "rows"
    x = torch.randn(12, 8, dtype=torch.float64)
    torch.testing.assert_close(
        population.forward(x, generation=0), expected(population, x, weights_of, 0), rtol=1e-6, atol=1e-7
    )


def test_verify_returns_the_largest_difference(filled):
    population = Population(filled(Model()), population_size=6, sigma=0.1)
    assert population.verify(torch.randn(12, 8)) < 1e-5
    assert Population(filled(Model()).bfloat16(), population_size=6).verify(torch.randn(12, 8).bfloat16()) < 0.5


@pytest.mark.parametrize("function", [mixes, moves, lambda model, x: x / x.norm(), lambda model, x: (x @ x.T) @ x])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [dict(population_size=4), dict(population_size=2), dict(population_size=16)])
def test_models_that_mix_their_rows_are_refused(function, dtype, options, filled):
    population = Population(filled(Model(function)).to(dtype), sigma=0.01, **options)
    x = torch.randn(2 * population.population_size, 8, dtype=dtype)
    with pytest.raises(UnsupportedOperationError, match="moves or mixes the rows of a batch"):
        population.verify(x)
    # without verify as well, and every time
    for _ in range(2):
        with pytest.raises(UnsupportedOperationError, match='mode="vmap" or mode="loop"'), population.perturbed(0):
            population.model(x)


def test_verify_sees_what_depends_on_the_inputs(filled):
    """Rows in order of their first entry: the first call's few rows may be in order already, others are not."""
    population = Population(filled(Model(lambda model, x: x if len(x) < 20 else x.flip(0))), population_size=10)
    with pytest.raises(UnsupportedOperationError, match="members evaluated in rows differ"):
        population.verify(torch.randn(20, 8))


def test_models_that_draw_random_numbers_are_not_refused(filled):
    population = Population(filled(Model(lambda model, x: x + torch.randn_like(x))), population_size=4)
    torch.manual_seed(3)
    with population.perturbed(0):
        first = population.model(torch.zeros(4, 8))
    torch.manual_seed(3)
    with population.perturbed(0):
        second = population.model(torch.zeros(4, 8))
    # the check before the first call takes nothing from the stream of random numbers
    assert torch.equal(first, second)


def test_a_table_as_long_as_there_are_rows_is_no_batch(filled, weights_of):
    def with_table(model, x):
        return x + model.first(model.table[:8]).mean(0)

    population = Population(filled(Model(with_table)).double(), population_size=8, sigma=0.1)
    x = torch.randn(8, 8, dtype=torch.float64)
    with population.perturbed(0):
        got = population.model(x)
    torch.testing.assert_close(got, expected(population, x, weights_of, 0), rtol=1e-6, atol=1e-7)


def test_one_batch_for_all_members(filled, weights_of):
    """An input without members is evaluated by all of them; ``split`` gives each member's outputs."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model()

        def forward(self):
            return self.inner(self.inner.table[:4])

    population = Population(filled(Constant()).double(), population_size=6, sigma=0.1)
    with population.perturbed(2) as active:
        got = active.split(population.model())
    for p in range(6):
        own = torch.func.functional_call(population.model, weights_of(population, p, 2), ())
        torch.testing.assert_close(got[p], own, rtol=1e-6, atol=1e-7)


def test_inputs_that_the_members_do_not_divide():
    population = Population(Model(), population_size=4)
    message = r"the inputs have 6 rows in dimension 0, which must be a multiple of the number of members \(=4\)"
    with pytest.raises(ConfigError, match=message), population.perturbed(0):
        population.model(torch.randn(6, 8))


def test_outputs_that_do_not_hold_the_members(filled):
    population = Population(filled(Model()), population_size=4)
    with population.perturbed(0) as active:
        out = population.model(torch.randn(8, 8))
        with pytest.raises(UnsupportedOperationError, match=r"an output of shape \(\) does not hold 4 members"):
            active.split(out.mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="fast"), "mode (='fast') must be one of: auto, rows, vmap, loop"),
        (dict(batch_dim=2), "batch_dim (=2) must be 0, or 1 for time-major inputs"),
        (dict(population_size=5), "population_size (=5) must be even when antithetic=True; use 6 or antithetic=False"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ConfigError) as error:
        Population(Model(), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (range(0), "not empty"),
        (range(2, 9), "must be within 0 to 3"),
        ([-1], "must be within 0 to 3"),
        ([0, 2], "must be consecutive"),
    ],
)
def test_members_that_do_not_exist(members, message):
    population = Population(Model(), population_size=4)
    with pytest.raises(ConfigError, match=message), population.perturbed(0, members):
        pass


@pytest.mark.parametrize("members", [range(0, 8), range(2, 5), range(7, 8)])
def test_ranges_of_members_give_the_same_members(members, filled):
    population = Population(filled(Model()), population_size=8, sigma=0.1)
    x = torch.randn(8, 8)
    whole = population.forward(x, generation=4)
    got = population.forward(x[members.start : members.stop], generation=4, members=members)
    torch.testing.assert_close(got, whole[members.start : members.stop], rtol=1e-6, atol=1e-6)


def test_autocast(filled):
    population = Population(filled(Model()), population_size=4, sigma=0.1)
    x = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16), population.perturbed(0):
        got = population.model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), population.forward(x, generation=0), rtol=0.05, atol=0.05)


def test_scalar_parameters_do_not_promote(filled):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.linear = nn.Linear(8, 3, dtype=torch.bfloat16)

        def forward(self, x):
            return self.linear(x * self.scale)

    population = Population(Scaled(), population_size=4, sigma=0.1)
    with population.perturbed(0):
        assert population.model(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compiled_parts_of_a_model(filled, weights_of):
    model = Model(lambda model, x: F.gelu(x)).double()
    model.first = torch.compile(filled(model).first, backend="eager")
    population = Population(model, population_size=4, sigma=0.1)
    x = torch.randn(8, 8, dtype=torch.float64)
    with population.perturbed(0):
        got = model(x)
    torch.testing.assert_close(got, expected(population, x, weights_of, 0), rtol=1e-6, atol=1e-7)
