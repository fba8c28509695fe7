"""Where models put their rows: second dimensions, groups, strides that a view needs, more than one dtype."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.torch import Population


class Model(nn.Module):
    def __init__(self, function, *parts, **shapes):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def time_major(function):
    """A function of ``(T, R, d)`` whose result is viewed, as torch's own strides allow."""

    def apply(model, x):
        y = function(model, x.transpose(0, 1).contiguous())
        return y.view(y.shape[0], y.shape[1], 2, -1).permute(1, 0, 2, 3)

    return apply


def attention(model, x):
    return model.parts[0](x, x, x, need_weights=False)[0]


def grouped(model, x):
    """DeepSeek-V4's grouped linear layer."""
    weight = model.w.view(2, -1, 4).transpose(1, 2)
    return torch.bmm(x.reshape(-1, 2, 4).transpose(0, 1), weight).transpose(0, 1).reshape(*x.shape[:2], -1)


def gates(model, x):
    """RecurrentGemma's gates."""
    heads = x.reshape(-1, 2, 4).permute(1, 0, 2)
    out = torch.baddbmm(model.b[:, None, :], heads, model.w)
    return out.transpose(0, 1).reshape(x.shape)


def gates_by_matmul(model, x):
    return (x.reshape(-1, 2, 4).permute(1, 0, 2) @ model.w + model.b[:, None]).transpose(0, 1).reshape(x.shape)


LAYOUTS = {
    "linear": lambda: Model(time_major(lambda m, x: m.parts[0](x)), nn.Linear(8, 6)),
    "scale": lambda: Model(time_major(lambda m, x: x * m.w), w=(8,)),
    "recurrent": lambda: Model(time_major(lambda m, x: m.parts[0](x)[0]), nn.GRU(8, 6)),
    "attention": lambda: Model(time_major(attention), nn.MultiheadAttention(8, 2)),
    "grouped": lambda: Model(grouped, w=(6, 4)),
    "grouped, dense": lambda: Model(
        lambda m, x: torch.bmm(x.reshape(-1, 2, 4).transpose(0, 1), m.w).transpose(0, 1).reshape(x.shape), w=(2, 4, 4)
    ),
    "gates": lambda: Model(gates, w=(2, 4, 4), b=(2, 4)),
    "gates by matmul": lambda: Model(gates_by_matmul, w=(2, 4, 4), b=(2, 4)),
}


@pytest.mark.parametrize("time", [3, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_in_other_dimensions(name, time, agree, filled):
    agree(filled(LAYOUTS[name]()), ((torch.randn(2, time, 8),), {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_rows_in_its_second_dimension(dtype, filled, weights_of):
    """Tables whose sizes are multiples of the rows are the same for all members."""

    def tables(model, x):
        return x + torch.bmm(model.table, model.w).sum((0, 1)) + (model.table.tanh() + model.b[:, None]).mean((0, 1))

    model = Model(tables, w=(2, 8, 8), b=(2, 8))
    model.table = torch.randn(2, 16, 8, dtype=dtype)
    population = Population(filled(model).to(dtype), population_size=4, sigma=0.1)
    x = torch.randn(8, 8, dtype=dtype)
    with population.perturbed(1):
        got = model(x)
    for p in range(4):
        rows = slice(2 * p, 2 * p + 2)
        expected = torch.func.functional_call(model, weights_of(population, p, 1), x[rows])
        torch.testing.assert_close(got[rows], expected, rtol=1e-4, atol=1e-4)


class MixedPrecision(nn.Module):
    """Norms and gates in float32, matrices in bfloat16, outputs in float32."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(8), nn.Parameter(torch.ones(8))
        self.first, self.second = nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.second(self.first(self.norm(x).bfloat16()) * self.gate)


def test_more_than_one_dtype(filled, weights_of):
    population = Population(filled(MixedPrecision()), population_size=4, sigma=0.1)
    x = torch.randn(8, 8)
    got = population.forward(x, generation=1)
    assert population.mode == "rows"
    for p in range(4):
        rows = slice(2 * p, 2 * p + 2)
        expected = torch.func.functional_call(population.model, weights_of(population, p, 1), x[rows])
        torch.testing.assert_close(got[rows], expected, rtol=0.02, atol=0.02)


class Compared(nn.Module):
    """Rows against rows, and a mask that is looked at in Python, as in CLIP."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, mask):
        if not mask.all():
            x = x * mask[:, None]
        y = F.normalize(self.linear(x), dim=-1)
        return (y @ y.t()).softmax(-1) * (1 if mask.sum().item() else 2)


@pytest.mark.parametrize(("kept", "mode"), [((1, 1, 1), "vmap"), ((1, 0, 1), "vmap"), (None, "loop")])
def test_decisions_that_all_members_take_alike(kept, mode, filled, weights_of):
    population = Population(filled(Compared()).double(), population_size=4, sigma=0.1)
    x = torch.randn(12, 8, dtype=torch.float64)
    mask = torch.ones(12) if kept is None else torch.tensor(kept * 4, dtype=torch.float)
    if kept is None:
        mask[0] = 0  # the first member only
    got = population.forward(x, mask, generation=1)
    assert population.mode == mode
    for p in range(4):
        rows = slice(3 * p, 3 * p + 3)
        expected = torch.func.functional_call(population.model, weights_of(population, p, 1), (x[rows], mask[rows]))
        torch.testing.assert_close(got[rows], expected, rtol=1e-6, atol=1e-7)
