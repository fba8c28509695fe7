"""What ``Population.forward`` takes and gives beside rows: states, parameters, statistics, a list with a row each."""

import pytest
import torch
from torch import nn

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population


class Recurrent(nn.Module):
    def __init__(self, cell=nn.GRU, **options):
        super().__init__()
        self.cell, self.head = cell(6, 5, batch_first=True, **options), nn.Linear(5, 2)

    def forward(self, x, state=None):
        out, state = self.cell(x, state)
        return self.head(out), state


class Policy(nn.Module):
    """A mean for each observation, and a learned scale that has nothing to do with them."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_std = nn.Linear(6, 3), nn.Parameter(torch.randn(3))
        self.register_buffer("low", torch.full((3,), -2.0))

    def forward(self, x):
        return self.mean(x), self.log_std, self.low, {"scale": self.log_std.exp().sum()}


class Detector(nn.Module):
    """A list with one entry for each row, as detectors give."""

    def __init__(self):
        super().__init__()
        self.boxes, self.names = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        scores = self.names(x)
        return [{"boxes": box.view(1, 4), "labels": score} for box, score in zip(self.boxes(x), scores, strict=True)]


class Similar(nn.Module):
    """Rows against rows, as CLIP compares them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        y = self.linear(x)
        return y @ y.t(), y


def population_of(model, filled, mode, **options):
    return Population(filled(model).double(), **{"population_size": 4, "sigma": 0.1, "mode": mode, **options})


def alone(population, weights_of, p, *args):
    return torch.func.functional_call(population.model, weights_of(population, p, 1), args)


@pytest.mark.parametrize("mode", ["rows", "vmap", "loop", "auto"])
@pytest.mark.parametrize("own", [1, 2])
def test_a_state_comes_in_and_goes_out(mode, own, filled, weights_of):
    if mode == "vmap":
        pytest.skip("recurrent layers have no vmap of their own")
    population = population_of(Recurrent(num_layers=2), filled, mode)
    x, h = torch.randn(4 * own, 3, 6).double(), torch.randn(2, 4 * own, 5).double()
    for state in (h, h[:, :, :].flip(1)):
        out, last = population.forward(x, state, generation=1)
        assert population.mode == ("rows" if mode == "auto" else mode)
        assert (out.shape, last.shape) == ((4 * own, 3, 2), (2, 4 * own, 5))
        for p in range(4):
            rows = slice(own * p, own * (p + 1))
            expected = alone(population, weights_of, p, x[rows], state[:, rows].contiguous())
            torch.testing.assert_close((out[rows], last[:, rows]), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["rows", "loop", "auto"])
def test_the_two_states_of_an_lstm(mode, filled, weights_of):
    population = population_of(Recurrent(nn.LSTM), filled, mode)
    x, state = torch.randn(4, 3, 6).double(), tuple(torch.randn(2, 1, 4, 5).double().unbind(0))
    out, (h, c) = population.forward(x, state, generation=1)
    for p in range(4):
        own = tuple(part[:, p : p + 1].contiguous() for part in state)
        expected = alone(population, weights_of, p, x[p : p + 1], own)
        torch.testing.assert_close((out[p : p + 1], (h[:, p : p + 1], c[:, p : p + 1])), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["vmap", "loop", "auto"])
@pytest.mark.parametrize("own", [1, 3])
def test_what_belongs_to_no_row_is_given_for_each_member(mode, own, filled, weights_of):
    """A learned scale as long as a member has rows, too."""
    population = population_of(Policy(), filled, mode)
    x = torch.randn(4 * own, 6).double()
    for _ in range(2):
        mean, log_std, low, more = population.forward(x, generation=1)
    assert population.mode == ("rows" if mode == "auto" else mode)
    assert (mean.shape, log_std.shape, low.shape, more["scale"].shape) == ((4 * own, 3), (4, 3), (4, 3), (4,))
    for p in range(4):
        expected = alone(population, weights_of, p, x[own * p : own * (p + 1)])
        got = mean[own * p : own * (p + 1)], log_std[p], low[p], {"scale": more["scale"][p]}
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["loop", "auto"])
@pytest.mark.parametrize("own", [1, 3])
def test_a_list_with_an_entry_for_each_row(mode, own, filled, weights_of):
    population = population_of(Detector(), filled, mode)
    x = torch.randn(4 * own, 6).double()
    got = population.forward(x, generation=1)
    assert population.mode == ("rows" if mode == "auto" else mode)
    assert len(got) == 4 * own
    for p in range(4):
        rows = slice(own * p, own * (p + 1))
        torch.testing.assert_close(got[rows], alone(population, weights_of, p, x[rows]), rtol=1e-6, atol=1e-7)


def test_rows_against_rows_are_no_rows(filled, weights_of):
    population = population_of(Similar(), filled, "auto")
    x = torch.randn(12, 6).double()
    logits, y = population.forward(x, generation=1)
    assert population.mode == "vmap"
    assert (logits.shape, y.shape) == ((12, 3), (12, 6))
    for p in range(4):
        rows = slice(3 * p, 3 * p + 3)
        expected = alone(population, weights_of, p, x[rows])
        torch.testing.assert_close((logits[rows], y[rows]), expected, rtol=1e-6, atol=1e-7)


def test_a_mask_as_long_as_there_are_rows_is_no_state(filled, weights_of):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, mask):
            return (mask.softmax(-1) @ self.linear(x)).sum(1)

    population = population_of(Masked(), filled, "loop")
    x, mask = torch.randn(8, 8, 6).double(), torch.randn(1, 8, 8).double()
    got = population.forward(x, mask, generation=1)
    for p in range(4):
        expected = alone(population, weights_of, p, x[2 * p : 2 * p + 2], mask)
        torch.testing.assert_close(got[2 * p : 2 * p + 2], expected, rtol=1e-6, atol=1e-7)


def test_members_with_outputs_of_their_own_sizes_are_refused_in_a_sentence(filled):
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            y = self.linear(x)
            return y[:, : 1 + int(y.argmax()) % 4]

    population = Population(filled(Chosen()), population_size=4, sigma=2.0)
    with pytest.raises(UnsupportedOperationError, match="the members' outputs have shapes of their own"):
        population.forward(torch.randn(8, 6), generation=0)


def test_parameters_without_entries_are_left_alone(filled):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.registers = nn.Linear(6, 4), nn.Parameter(torch.zeros(1, 0, 6))

        def forward(self, x):
            return self.linear(torch.cat([self.registers.expand(len(x), 0, 6), x[:, None]], dim=1))

    population = Population(filled(Empty()), population_size=4)
    assert [spec.name for spec in population.specs] == ["linear.weight", "linear.bias"]
    assert population.forward(torch.randn(8, 6), generation=0).shape == (8, 1, 4)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_mean_over_the_batch_is_each_members_own(precision, filled, weights_of, monkeypatch):
    """Also where rounding is allowed that hides how little the members differ."""
    model = filled(nn.Linear(6, 4))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x):
            return (self.linear(x) - 5.0).abs().mean()

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    population = Population(Loss(), population_size=4, sigma=0.001)
    x = torch.randn(8, 6)
    got = population.forward(x, generation=0)
    assert population.mode in ("vmap", "loop")
    for p in range(4):
        expected = torch.func.functional_call(population.model, weights_of(population, p, 0), x[2 * p : 2 * p + 2])
        torch.testing.assert_close(got[p], expected, rtol=1e-6, atol=1e-6)
