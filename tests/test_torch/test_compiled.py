"""Compiled and scripted parts of models: evaluated as they are written, or refused in a sentence."""

import pytest
import torch
from torch import nn

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population


class Net(nn.Module):
    def __init__(self, function=torch.tanh):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(8, 8), nn.Linear(8, 3), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("where", ["the model", "in place", "a part", "a function"])
@pytest.mark.parametrize("mode", ["rows", "vmap", "loop"])
def test_nothing_is_compiled_while_a_model_is_its_population(where, mode, filled, weights_of):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    plain = filled(Net()).double()
    model = plain
    if where == "the model":
        model = torch.compile(plain, backend=backend)
    elif where == "in place":
        plain.compile(backend=backend)
    elif where == "a part":
        model.first = torch.compile(plain.first, backend=backend)
    else:
        model.function = torch.compile(torch.tanh, backend=backend)
    population = Population(model, population_size=4, sigma=0.1, mode=mode)
    x = torch.randn(8, 8, dtype=torch.float64)
    got = population.forward(x, generation=1)
    assert not compiled
    for p in range(4):
        rows = slice(2 * p, 2 * p + 2)
        weights = weights_of(population, p, 1)
        names = {name: name.replace("_orig_mod.", "") for name in weights}
        reference = Net().double()
        reference.load_state_dict({names[name]: weight for name, weight in weights.items()})
        torch.testing.assert_close(got[rows], reference(x[rows]), rtol=1e-6, atol=1e-7)
    model(x)
    assert compiled  # and again as soon as the block is over


@torch.jit.script
def scaled(x, weight):
    return x * weight + 1


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, x):
        return scaled(self.linear(x), self.scale)


def test_scripted_functions_are_refused_with_a_text_and_work_in_other_modes(filled, weights_of):
    population = Population(filled(Scripted()).double(), population_size=4, sigma=0.1)
    x = torch.randn(8, 8, dtype=torch.float64)
    message = r"parameter 'scale' is perturbed and reached the operation aten\.mul\.Tensor without a population rule"
    with population.perturbed(0):
        population.model(x)  # what watches the first call lets the values through
    with pytest.raises(UnsupportedOperationError, match=message), population.perturbed(0):
        population.model(x)
    got = population.forward(x, generation=1)
    assert population.mode == "vmap"
    for p in range(4):
        rows = slice(2 * p, 2 * p + 2)
        expected = torch.func.functional_call(population.model, weights_of(population, p, 1), x[rows])
        torch.testing.assert_close(got[rows], expected, rtol=1e-6, atol=1e-7)
