"""Inputs that all members share: the same results as copies of them, whatever the model does with them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population
from eggroll.torch.ops.shared import SharedRows
from eggroll.torch.perturbed import MemberTensor, PerturbedWeight


class Layer(nn.Module):
    """A layer made of one function of its input and parameters."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x):
        return self.function(x, *self.parts)


# What the first layer may do with its input, whether the one batch is enough for it, and the input.
CASES = {
    "linear": (F.linear, [(5, 6), (5,)], True, (4, 6)),
    "linear without bias": (F.linear, [(5, 6)], True, (4, 3, 6)),
    "matmul": (lambda x, w: x @ w.T, [(5, 6)], True, (4, 6)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), [(6, 5), (5,)], True, (4, 6)),
    "flatten": (lambda x, w: F.linear(x.flatten(1), w), [(5, 6)], True, (4, 2, 3)),
    "view by length": (lambda x, w: F.linear(x.view(x.shape[0], -1), w), [(5, 6)], True, (4, 2, 3)),
    "view by width": (lambda x, w: F.linear(x.reshape(-1, 6), w), [(5, 6)], True, (4, 2, 3)),
    "view into more rows": (lambda x, w: F.linear(x.reshape(-1, 3), w), [(5, 3)], False, (4, 2, 3)),
    "view back": (lambda x, w: F.linear(x.view(-1, 2, 3).flatten(1), w), [(5, 6)], True, (4, 6)),
    "relu first": (lambda x, w: F.linear(torch.relu(x), w), [(5, 6)], True, (4, 6)),
    "cast": (lambda x, w: F.linear(x.double().float(), w), [(5, 6)], True, (4, 6)),
    "conv1d": (nn.Conv1d(2, 5, 3, padding=1), [], True, (4, 2, 7)),
    "conv2d": (nn.Conv2d(2, 5, 3, stride=2, bias=False), [], True, (4, 2, 7, 7)),
    "conv2d in groups": (nn.Conv2d(2, 4, 3, groups=2), [], True, (4, 2, 7, 7)),
    "a dense kernel": (F.conv1d, [(5, 2, 3)], False, (4, 2, 7)),
    "a scale": (lambda x, w: x * w, [(6,)], False, (4, 6)),
    "used twice": (lambda x, w, s: F.linear(x, w) + x * s, [(6, 6), (6,)], False, (4, 6)),
    "an index": (lambda x, w: F.linear(x[:, 0], w), [(5, 6)], False, (4, 3, 6)),
    "concatenation": (lambda x, w: F.linear(torch.cat([x, x], 1), w), [(5, 12)], False, (4, 6)),
    "norm": (lambda x, s, b: F.layer_norm(x, (6,), s, b), [(6,), (6,)], False, (4, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_as_if_they_were_copied(name, monkeypatch):
    function, shapes, once, shape = CASES[name]
    torch.manual_seed(0)
    model = (function if isinstance(function, nn.Module) else Layer(function, *shapes)).eval()
    population = Population(model, population_size=6, rank=2, sigma=0.3)
    x = torch.randn(shape)
    copies = []
    real = SharedRows.written_out
    with population.perturbed(1) as active:
        expected = active.split(model(x.repeat(6, *([1] * (x.ndim - 1)))))
        monkeypatch.setattr(SharedRows, "written_out", lambda self: copies.append(1) or real(self))
        got = active.split(model(active.expand(x)))
    assert (not copies) == once
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for p in range(6):
        with population.member(1, p) as alone:
            torch.testing.assert_close(got[p], alone(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_not_perturbed_stays_shared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    population = Population(model, population_size=4, exclude=["0"])
    x = torch.randn(2, 6)
    with population.perturbed(0) as active:
        hidden = model[1](model[0](active.expand(x)))
        assert isinstance(hidden, SharedRows)
        assert hidden.shape == (8, 5)
        got = active.split(model[2](hidden))
    with population.member(0, 3) as alone:
        torch.testing.assert_close(got[3], alone(x), rtol=1e-5, atol=1e-5)


def test_a_frozen_first_layer_may_be_followed_by_an_activation_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).eval()
    population = Population(model, population_size=4, exclude=["0"])
    x = torch.randn(2, 6)
    with population.perturbed(0) as active:
        got = active.split(model(active.expand(x)))
    with population.member(0, 2) as alone:
        torch.testing.assert_close(got[2], alone(x), rtol=1e-5, atol=1e-5)


def test_functions_called_with_names_of_arguments():
    population = Population(nn.Linear(6, 2).eval(), population_size=4)
    x = torch.randn(3, 2, 3)
    with population.perturbed(0) as active:
        rows, copies = active.expand(x), x.repeat(4, 1, 1)
        assert torch.equal(torch.reshape(rows, shape=(12, 6)) + 0, copies.reshape(12, 6))
        assert torch.equal(torch.flatten(input=rows, start_dim=1) + 0, copies.flatten(1))
        plain = torch.randn(2, 6)
        assert torch.equal(F.linear(input=rows.flatten(1), weight=plain) + 0, F.linear(copies.flatten(1), plain))


def test_what_an_expanded_input_shows_is_what_copies_would():
    population = Population(nn.Linear(3, 2).eval(), population_size=4)
    x = torch.randn(5, 3)
    with population.perturbed(0) as active:
        rows = active.expand(x)
        assert (rows.shape, rows.dtype, rows.ndim, len(rows), rows.size(0)) == ((20, 3), torch.float32, 2, 20, 20)
        assert torch.equal(rows + 0, x.repeat(4, 1))
        assert torch.equal(rows[7], x[2])
        assert rows.sum().item() == pytest.approx(4 * x.sum().item(), rel=1e-5)
        assert torch.equal(rows.index_select(0, torch.tensor([6, 19])), x[[1, 4]])
        assert torch.equal(active.split(rows), x.expand(4, 5, 3))
        assert torch.equal(rows.clone().add_(1), x.repeat(4, 1) + 1)
        assert torch.equal(torch.as_tensor(rows.numpy()), x.repeat(4, 1))


WRITES = [lambda x: x.add_(1), lambda x: F.relu(x, inplace=True), lambda x: x.__setitem__(0, 0)]


@pytest.mark.parametrize("write", WRITES)
def test_it_is_never_changed_in_place(write):
    population = Population(nn.Linear(3, 2).eval(), population_size=4)
    x = torch.ones(5, 3)
    with population.perturbed(0) as active:
        rows = active.expand(x)
        with pytest.raises(
            UnsupportedOperationError, match=r"is the same for all members and would be changed in place"
        ):
            write(rows)
    assert torch.equal(x, torch.ones(5, 3))


@pytest.mark.parametrize("x", [torch.arange(4), torch.randn(4), torch.randn(0, 3)], ids=["integers", "vector", "empty"])
def test_what_has_no_rule_is_copied_at_once(x):
    population = Population(nn.Linear(3, 2).eval(), population_size=2)
    with population.perturbed(0) as active:
        assert type(active.expand(x)) is torch.Tensor
    with population.perturbed(0, range(1)) as active:
        assert active.expand(x) is x


def test_a_module_that_keeps_its_input_gets_back_what_it_had():
    """A value of the block must not be found in the model afterwards."""
    model = nn.Linear(3, 2).eval()
    model.register_forward_pre_hook(lambda module, args: setattr(module, "seen", args[0]))
    model.seen = None
    population = Population(model, population_size=2)
    with population.perturbed(0) as active:
        model(active.expand(torch.randn(4, 3)))
    assert not isinstance(model.seen, SharedRows | PerturbedWeight | MemberTensor)
