"""Calls that name their arguments, ``out=``, and operators that torch answers with ``NotImplemented``."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population
from eggroll.torch.ops import shared
from eggroll.torch.ops.arguments import bind, signatures
from eggroll.torch.ops.registry import RULES


class Model(nn.Module):
    """One function of a model and its input, with parameters of given shapes."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function, self.linear = function, nn.Linear(8, 8)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def addmm(model, x):
    return torch.addmm(input=model.b, mat1=x.flatten(0, 1), mat2=model.w, alpha=1).view(x.shape)


def recurrent(model, x):
    hx = torch.zeros(1, x.shape[0], 8, dtype=x.dtype)
    weights = [model.w, model.w, model.b, model.b]
    return torch.gru(
        x, hx=hx, params=weights, has_biases=True, num_layers=1, dropout=0.0, train=False, bidirectional=False,
        batch_first=True,
    )[0]  # fmt: skip


KEYWORDS = {
    "linear": (lambda m, x: F.linear(input=x, weight=m.w), {"w": (8, 8)}),
    "linear, another order": (lambda m, x: F.linear(bias=m.b, weight=m.w, input=x), {"w": (8, 8), "b": (8,)}),
    "matmul": (lambda m, x: torch.matmul(input=x, other=m.w), {"w": (8, 8)}),
    "matmul of a method": (lambda m, x: x.matmul(other=m.w), {"w": (8, 8)}),
    "numpy's names": (lambda m, x: torch.add(x1=x, x2=m.b), {"b": (8,)}),
    "mm": (lambda m, x: torch.mm(input=x[:, 0], mat2=m.w), {"w": (8, 8)}),
    "addmm": (addmm, {"w": (8, 8), "b": (8,)}),
    "conv1d": (lambda m, x: F.conv1d(input=x, weight=m.w, padding=1), {"w": (8, 3, 3)}),
    "conv1d, a gap": (lambda m, x: F.conv1d(x, m.w, stride=1, padding="same", groups=1), {"w": (8, 3, 3)}),
    "layer_norm": (lambda m, x: F.layer_norm(input=x, normalized_shape=(8,), bias=m.b), {"b": (8,)}),
    "add with alpha": (lambda m, x: torch.add(other=m.b, input=x, alpha=0.5), {"b": (8,)}),
    "where": (lambda m, x: torch.where(condition=x > 0, input=x, other=m.b), {"b": (8,)}),
    "where of a method": (lambda m, x: x.where(other=m.b, condition=x > 0), {"b": (8,)}),
    "expand": (lambda m, x: x + m.b.expand(size=(len(x), 3, 8)), {"b": (1, 1, 8)}),
    "repeat": (lambda m, x: x + m.b.repeat(repeats=(len(x), 1, 1)), {"b": (1, 3, 8)}),
    "transpose": (lambda m, x: x @ torch.transpose(input=m.w, dim1=0, dim0=1), {"w": (8, 8)}),
    "bmm": (
        lambda m, x: torch.bmm(input=x.transpose(0, 1), mat2=m.expert_w).transpose(0, 1),
        {"expert_w": (3, 8, 8)},
    ),
    "softmax": (lambda m, x: x * torch.softmax(input=m.b, dim=0), {"b": (8,)}),
    "softmax, numpy's names": (lambda m, x: x * m.b.sum(axis=0, keepdims=True), {"b": (8,)}),
    "attention": (
        lambda m, x: F.scaled_dot_product_attention(query=x[:, None], key=x[:, None], attn_mask=m.b, value=x[:, None]),
        {"b": (1, 1, 3, 3)},
    ),
    "gru": (recurrent, {"w": (24, 8), "b": (24,)}),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_keyword(name, agree, filled):
    function, shapes = KEYWORDS[name]
    agree(filled(Model(function, **shapes)), ((torch.randn(2, 3, 8),), {}))


@pytest.mark.parametrize("name", ["linear", "matmul", "addmm", "conv1d"])
def test_arguments_by_keyword_in_a_shared_input(name, filled, weights_of):
    function, shapes = KEYWORDS[name]
    model = filled(Model(function, **shapes)).double()
    population = Population(model, population_size=4, sigma=0.1)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with population.perturbed(2) as active:
        got = active.split(model(active.expand(x)))
    for p in range(4):
        torch.testing.assert_close(got[p], torch.func.functional_call(model, weights_of(population, p, 2), x))


def test_every_rule_takes_every_call_that_torch_takes():
    """No argument of a torch function with a rule has another name or place there."""
    fixed = 0
    for func, implementation in [*RULES.items(), *shared._RULES.items()]:
        parameters = inspect.signature(implementation).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        names = [parameter.name for parameter in parameters]
        for signature in signatures(func):
            by_name = {name for name, by_position in signature if not by_position} - {"out"}
            by_position = [name for name, by_position in signature if by_position]
            if "__get__" in repr(func) or by_position == ["args"]:
                continue
            assert inspect.Parameter.VAR_KEYWORD in kinds or by_name <= set(names), func
            if inspect.Parameter.VAR_POSITIONAL not in kinds:
                assert len(by_position) <= len(names), func
                fixed += 1
    assert fixed > 50


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "bound"),
    [
        (F.linear, (1,), {"bias": 3, "weight": 2}, ((1, 2, 3), {})),
        (F.layer_norm, (1, 2), {"eps": 5, "bias": 4}, ((1, 2), {"eps": 5, "bias": 4})),
        (torch.matmul, (), {"x1": 1, "x2": 2}, ((1, 2), {})),
        (torch.Tensor.where, (1,), {"other": 3, "condition": 2}, ((1, 2, 3), {})),
        (torch.where, (), {"other": 3, "condition": 1, "input": 2}, ((1, 2, 3), {})),
        (torch.add, (1,), {"other": 2, "alpha": 3}, ((1, 2), {"alpha": 3})),
        (torch.sum, (1,), {"keepdims": True, "axis": 0}, ((1, 0, True), {})),
        (torch.einsum, ("ij->i",), {"nothing": 1}, (("ij->i",), {"nothing": 1})),
    ],
)
def test_bind(func, args, kwargs, bound):
    assert bind(func, args, kwargs) == bound


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.add(x, m.linear.bias, out=torch.empty_like(x)),
        lambda m, x: torch.matmul(x, m.linear.weight, out=torch.empty_like(x)),
        lambda m, x: torch.mm(out=torch.empty_like(x), input=x, mat2=m.linear.weight),
    ],
)
def test_out_is_refused_clearly_and_works_one_by_one(function, filled, weights_of):
    model = filled(Model(function)).double()
    population = Population(model, population_size=4, sigma=0.1)
    x = torch.randn(8, 8, dtype=torch.float64)
    message = r"parameter 'linear\.\w+' is perturbed and used by .*(add|matmul|mm), with out=: the tensor given is for"
    with pytest.raises(UnsupportedOperationError, match=message), population.perturbed(0):
        model(x)
    got = population.forward(x, generation=1)
    for p in range(4):
        rows = slice(2 * p, 2 * p + 2)
        torch.testing.assert_close(got[rows], torch.func.functional_call(model, weights_of(population, p, 1), x[rows]))


def test_out_may_not_be_a_parameter(filled):
    model = filled(Model(lambda m, x: torch.mul(x[:8], 2, out=m.linear.weight)))
    for members in (None, range(1)):
        population = Population(model, population_size=4)
        with (
            pytest.raises(UnsupportedOperationError, match="never changed during an evaluation"),
            population.perturbed(0, members),
        ):
            model(torch.randn(8, 8))


OPERATORS = {
    "==": lambda m, x: x + (x.transpose(0, 1) == m.w).to(x.dtype).transpose(0, 1),
    "<": lambda m, x: x * (x.transpose(0, 1) < m.w).transpose(0, 1),
    "+=": lambda m, x: (x.transpose(0, 1).clone().__iadd__(m.w)).transpose(0, 1),
    "**": lambda m, x: (x.transpose(0, 1).abs() ** m.w).transpose(0, 1),
    "@": lambda m, x: (x.transpose(1, 2) @ m.square[None].expand(len(x), 3, 3)).transpose(1, 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_with_the_members_in_the_second_dimension(name, filled, weights_of):
    """Torch turns every TypeError of an operator into NotImplemented: ``==`` would then compare identities."""
    model = filled(Model(OPERATORS[name], w=(8,), square=(3, 3))).double()
    population = Population(model, population_size=4, sigma=0.1)
    x = torch.randn(8, 3, 8, dtype=torch.float64)
    x[0, 0, 0] = 7.0
    with population.perturbed(1) as active:
        got = active.split(model(x)).flatten(0, 1)
    for p in range(4):
        rows = slice(2 * p, 2 * p + 2)
        own = torch.func.functional_call(model, weights_of(population, p, 1), x[rows])
        torch.testing.assert_close(got[rows], own)


def test_the_message_of_an_operator_arrives(filled):
    model = filled(Model(lambda m, x: x + (x.relu().sum(0) @ m.linear.weight == m.linear.bias.tolist()[0]).any()))
    population = Population(model, population_size=4)
    message = "parameter 'linear.bias' is perturbed and .*tolist turns it into float"
    with pytest.raises(UnsupportedOperationError, match=message), population.perturbed(0):
        model(torch.randn(8, 8))
