"""``split`` takes what a model gives as it is: recurrent states, tuples, learned scales, buffers."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch import EGGROLL, Population


class Policy(nn.Module):
    """A recurrent policy: a mean, a learned scale, bounds that are the same for all, and the state."""

    def __init__(self):
        super().__init__()
        self.cell, self.mean = nn.GRU(6, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)
        self.log_std = nn.Parameter(torch.randn(3))
        self.register_buffer("low", torch.tensor([-1.0, -2.0, -3.0]))

    def forward(self, x, h=None):
        out, h = self.cell(x, h)
        return {"mean": self.mean(out), "log_std": self.log_std, "low": self.low}, h


def of(tree, p):
    return tree_map(lambda x: x[p], tree)


def alone(population, p, *inputs):
    with population.member(0, p) as model, torch.no_grad():
        return model(*inputs)


CELLS = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "as many layers as rows": {"num_layers": 4},
    "twice as many layers as rows": {"num_layers": 4, "bidirectional": True},
}
STATES = [(cell, options) for cell in (nn.LSTM, nn.GRU, nn.RNN) for options in CELLS.values()]


@pytest.mark.parametrize("own", [1, 2])
@pytest.mark.parametrize(("cell", "options"), [*STATES, (nn.LSTM, {"proj_size": 3})])
def test_states_have_their_rows_in_the_second_dimension(cell, options, own, filled):
    model = filled(cell(6, 5, batch_first=True, **options))
    population = Population(model, population_size=4, sigma=0.1)
    x = torch.randn(4 * own, 3, 6)
    with population.perturbed(0) as active, torch.no_grad():
        first = active.split(model(x))
        state = model(x)[1]
        second = active.split(model(x, state))
        separate = tree_map(active.split, model(x, state))
    state = tree_map(lambda h: h.unflatten(1, (4, -1)), state)
    for p in range(4):
        rows = x[own * p : own * (p + 1)]
        torch.testing.assert_close(of(first, p), alone(population, p, rows))
        before = tree_map(lambda h, p=p: h[:, p].contiguous(), state)
        for got in (second, separate):
            torch.testing.assert_close(of(got, p), alone(population, p, rows, before))


@pytest.mark.parametrize("mode", ["rows", "loop", "auto"])
def test_what_forward_gave_is_split_outside_of_a_block(mode, filled):
    population = Population(filled(Policy()), population_size=4, sigma=0.1, mode=mode)
    x, h = torch.randn(8, 3, 6), torch.randn(2, 8, 5)
    for _ in range(2):
        outputs, state = population.forward(x, h, generation=0)
        if mode == "rows":
            outputs.pop("low")  # unchecked, so given as the model gave it
        got = population.split((outputs, state))
        assert (got[0]["mean"].shape, got[0]["log_std"].shape, got[1].shape) == ((4, 2, 3, 3), (4, 3), (4, 2, 2, 5))
        for p in range(4):
            expected, last = alone(population, p, x[2 * p : 2 * p + 2], h[:, 2 * p : 2 * p + 2].contiguous())
            expected = {name: expected[name] for name in got[0]}
            torch.testing.assert_close(of(got, p), (expected, last), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(population.split(torch.tanh(state)), torch.tanh(got[1]))


def test_a_scale_and_a_buffer_beside_the_rows(filled):
    model = filled(Policy())
    population = Population(model, population_size=4, sigma=0.1)
    x, h = torch.randn(4, 3, 6), torch.zeros(2, 1, 5)
    with population.perturbed(0) as active, torch.no_grad():
        outputs, state = active.split(model(x, active.expand(h, dim=1)))
        assert outputs["low"].shape == outputs["log_std"].shape == (4, 3)
        assert state.shape == (4, 2, 1, 5)
    for p in range(4):
        expected = alone(population, p, x[p : p + 1])
        torch.testing.assert_close((of(outputs, p), state[p]), expected, rtol=1e-5, atol=1e-6)


def test_one_member_has_the_same_form(filled):
    model = filled(Policy())
    population = Population(model, population_size=4, sigma=0.1)
    x = torch.randn(2, 3, 6)
    with population.perturbed(0, range(2, 3)) as active, torch.no_grad():
        outputs, state = active.split(model(x))
    assert (outputs["mean"].shape, outputs["log_std"].shape, state.shape) == ((1, 2, 3, 3), (1, 3), (1, 2, 2, 5))
    torch.testing.assert_close(of((outputs, state), 0), alone(population, 2, x))


def test_what_was_made_of_a_state(filled):
    model = filled(nn.GRU(6, 5, num_layers=4, batch_first=True))
    population = Population(model, population_size=4, sigma=0.1)
    with population.perturbed(0) as active, torch.no_grad():
        h = model(torch.randn(8, 3, 6))[1]
        assert torch.equal(active.split(h.tanh()), active.split(h).tanh())  # (4, 8, 5): 8 rows can only be there
        assert torch.equal(active.split(h[-1]), active.split(h)[:, -1])
        h = model(torch.randn(4, 3, 6))[1]
        message = r"rows of 4 members can be in dimension 0 or 1 of a tensor of shape \(4, 4, 5\).*split\(y, dim=1\)"
        with pytest.raises(UnsupportedOperationError, match=message):
            active.split(h.tanh())
        assert torch.equal(active.split(h.tanh(), dim=1), active.split(h).tanh())
        assert torch.equal(active.split(h.tanh(), dim=-2), active.split(h).tanh())


def test_a_state_of_a_model_that_takes_one_batch_size_only(filled):
    """Without a probe, sizes decide; where they do not, that is said."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(6, 5, num_layers=2, batch_first=True)
            self.register_buffer("start", torch.zeros(2, 8, 5))

        def forward(self, x):
            return self.cell(x, self.start[:, : len(x)].view(2, 8, 5))

    model = filled(Fixed())
    population = Population(model, population_size=4, sigma=0.1)
    with population.perturbed(0) as active, torch.no_grad():
        out, h = model(torch.randn(8, 3, 6))
        assert (active.split(out).shape, active.split(h).shape) == ((4, 2, 3, 5), (4, 2, 2, 5))
        with pytest.raises(UnsupportedOperationError, match="can be in dimension 0 or 1"):
            active.split(torch.randn(16, 8, 5))


def test_statistics_over_rows_are_still_no_rows(filled):
    """Also where a dimension is as long as there are rows by chance."""
    model = filled(nn.Linear(8, 8))
    population = Population(model, population_size=4)
    with population.perturbed(0) as active, torch.no_grad():
        y = model(torch.randn(8, 8, 8))
        assert active.split(y).shape == (4, 2, 8, 8)
        for mixed, held in ((y.mean(0, keepdim=True), "the 8 rows of 4"), ({"y": y, "loss": y.mean()}, "4")):
            with pytest.raises(UnsupportedOperationError, match=f"does not hold {held} members"):
                active.split(mixed)


def test_a_dimension_that_is_none_is_refused(filled):
    model = filled(nn.Linear(6, 5))
    population = Population(model, population_size=4)
    with pytest.raises(ConfigError, match=r"population\.split is for what population\.forward gave: call that first"):
        population.split(torch.zeros(4, 5))
    with population.perturbed(0) as active:
        y = model(torch.randn(8, 6))
        for dim in (1, 2, -3):
            message = rf"dim \(={dim}\) must be a dimension of \(8, 5\) whose size is a multiple of .* members \(=4\)"
            with pytest.raises(ConfigError, match=message):
                active.split(y, dim=dim)


def test_the_optimizer_splits_tuples(filled):
    model = filled(nn.LSTM(6, 5, batch_first=True))
    seen = []

    def fitness(_):
        out, (h, c) = opt.split(model(opt.expand(torch.ones(2, 3, 6))))
        seen.append((out.shape, h.shape, c.shape))
        return h.mean((1, 2, 3))

    opt = EGGROLL(model.parameters(), model=model, fitness_fn=fitness, population_size=4, batched=True)
    opt.step()
    assert seen[0] == ((4, 2, 3, 5), (4, 1, 2, 5), (4, 1, 2, 5))
