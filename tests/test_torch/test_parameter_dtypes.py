"""Parameters that real noise cannot be added to are left alone, or refused where they are asked for by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.core.oracle import member_params
from eggroll.errors import SelectionError
from eggroll.torch import Population

DTYPES = {
    "uint8": torch.uint8,
    "int64": torch.int64,
    "bool": torch.bool,
    "complex64": torch.complex64,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class Packed(nn.Module):
    """A layer whose first weight is kept in another dtype than it is used in, as quantized layers do."""

    def __init__(self, dtype):
        super().__init__()
        self.packed = nn.Parameter(torch.randint(0, 2, (6, 6)).float().to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(6, 1) + 0.5)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        weight = self.packed.real if self.packed.is_complex() else self.packed
        return self.second(F.linear(x, weight.to(x.dtype) * self.scale))


@pytest.mark.parametrize("mode", ["rows", "vmap", "loop"])
@pytest.mark.parametrize("name", DTYPES)
def test_left_alone(name, mode):
    model = Packed(DTYPES[name]).eval()
    population = Population(model, population_size=4, sigma=0.2, seed=3, mode=mode)
    assert [spec.name for spec in population.specs] == ["scale", "second.weight", "second.bias"]
    before = model.packed.detach().view(torch.uint8).clone()
    x = torch.randn(8, 6)
    got = population.forward(x, generation=1)
    assert torch.equal(model.packed.detach().view(torch.uint8), before)
    centers = {spec.name: population.parameter(spec.name).detach().numpy() for spec in population.specs}
    for p in range(4):
        own = member_params(centers, population.specs, p, sigma=0.2, rank=1, seed=3, generation=1)
        weights = {key: torch.as_tensor(value).float() for key, value in own.items()}
        expected = torch.func.functional_call(model, weights, x[2 * p : 2 * p + 2])
        torch.testing.assert_close(got[2 * p : 2 * p + 2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DTYPES)
def test_refused_by_name(name):
    message = (
        rf"pattern 'packed' matches only parameters that cannot be perturbed: packed is {name}, allowed are float64"
    )
    with pytest.raises(SelectionError, match=message):
        Population(Packed(DTYPES[name]), population_size=4, target_modules=["packed", "second"])
    # a pattern that takes others too leaves it alone
    taken = Population(Packed(DTYPES[name]), population_size=4, target_modules=["*c*"]).specs
    assert [spec.name for spec in taken] == ["scale", "second.weight", "second.bias"]


def test_nothing_is_left():
    model = nn.Module()
    model.packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SelectionError, match=r"1 of them of dtypes that cannot be perturbed \(int8\)"):
        Population(model, population_size=4)
