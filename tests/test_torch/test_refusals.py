"""What has no exact population rule is refused with a text: which parameter, which operation, and what to do."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.errors import EggrollError, UnsupportedOperationError
from eggroll.torch import Population
from eggroll.torch.perturbed import Value


class Model(nn.Module):
    def __init__(self, function, *, extra=None, **shapes):
        super().__init__()
        self.linear, self.function, self.extra = nn.Linear(8, 8), function, extra
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("table", torch.randn(16, 8))

    def forward(self, x):
        return self.function(self, x)


class StackedExperts(nn.Module):
    """The same with all experts in one 3-D parameter."""

    def __init__(self):
        super().__init__()
        self.router, self.expert_weights = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for index in range(4):
            where = (chosen == index).nonzero()[:, 0]
            out = out + (x[where] @ self.expert_weights[index]).sum(0)
        return out


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


def without_torch_function(model, x):
    with torch._C.DisableTorchFunctionSubclass():
        return F.linear(x, model.linear.weight)


def written_copy(model, x):
    weight = model.linear.weight.clone()
    weight[0] = 0.0
    return F.linear(x, weight)


def assign_row(model, x):
    x = x.clone()
    x[0] = model.w
    return x


def accumulate_in_a_shared_tensor(model, x):
    return x + torch.zeros(8, dtype=x.dtype).add_(model.w)


def _without_statistics():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=False))


REFUSED = {
    # name: (model, shape of a row, what the message says, whether one member at a time works)
    "tolist": (lambda: Model(lambda m, x: x * m.linear.bias.tolist()[0]), "tolist turns it into", True),
    "item": (lambda: Model(lambda m, x: x * m.linear.bias.sum().item()), "item turns it into float", True),
    "numpy": (lambda: Model(lambda m, x: x * float(m.linear.bias.numpy()[0])), "numpy turns it into", True),
    "bool": (lambda: Model(lambda m, x: x if m.linear.bias.sum() > 0 else -x), "__bool__ turns it into bool", True),
    "nonzero": (lambda: Model(lambda m, x: x + m.w[m.w > 0.6].mean(), w=(64,)), "results of different shapes", True),
    "set_data": (lambda: Model(_set_data), "would be changed in place by", False),
    "copy": (lambda: Model(lambda m, x: (m.linear.weight.copy_(m.linear.weight * 2), m.linear(x))[1]), "copy_", False),
    "clamp": (lambda: Model(lambda m, x: (m.linear.weight.clamp_(-1, 1), m.linear(x))[1]), "clamp_", False),
    "data_clamp": (lambda: Model(lambda m, x: (m.linear.weight.data.clamp_(-1, 1), m.linear(x))[1]), "clamp_", False),
    "assign": (lambda: Model(_assign_weight), "would be changed in place by", False),
    "assign_row": (lambda: Model(assign_row, w=(8,)), "rows are addressed by an index", True),
    "shared_tensor": (lambda: Model(accumulate_in_a_shared_tensor, w=(8,)), "different results of each member", True),
    "out": (lambda: Model(lambda m, x: torch.add(x, m.w, out=torch.empty_like(x)), w=(8,)), "out=", True),
    "cpp": (lambda: Model(without_torch_function), "reached the operation aten", True),
    "packed": (Packed, "Pad instead of packing", True),
    "row_by_row": (lambda: Model(lambda m, x: torch.stack([m.linear(row) for row in x])), "", True),
    "pieces": (lambda: Model(lambda m, x: torch.cat([m.linear(part) for part in x.split(2)])), "", True),
    "bag": (lambda: Model(_bag, extra=nn.EmbeddingBag(20, 8)), "offsets", True),
    "statistics": (_without_statistics, "BatchNorm1d", True),
    "time_major_einsum": (lambda: Model(_time_major_einsum, w=(8, 5)), "members in the second dimension", True),
}  # fmt: skip


def _set_data(model, x):
    model.linear.weight.data = model.linear.weight * 2
    return model.linear(x)


def _assign_weight(model, x):
    model.linear.weight[0] = 1.0
    return model.linear(x)


def _bag(model, x):
    return model.extra(torch.arange(len(x) * 3) % 20, torch.arange(len(x)) * 3) + model.linear(x)


def _time_major_einsum(model, x):
    return torch.einsum("tbd,dm->tbm", x.transpose(0, 1), model.w).transpose(0, 1)


def shape_of(name):
    return (3, 8) if name in ("packed", "time_major_einsum") else (8,)


@pytest.mark.parametrize("options", [dict(population_size=4), dict(population_size=8, antithetic=False, rank=1)])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_left_behind(name, options, filled):
    build, text, _ = REFUSED[name]
    model = filled(build())
    before = {key: (x, x.clone()) for key, x in model.state_dict(keep_vars=True).items()}
    population = Population(model, sigma=0.1, **options)
    x = torch.randn(2 * population.population_size, *shape_of(name))
    with pytest.raises(EggrollError) as error, population.perturbed(0) as active:
        active.split(model(x))
    assert text in str(error.value)
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[key][0], key
        assert torch.equal(tensor, before[key][1]), key
    with pytest.raises(UnsupportedOperationError):
        population.verify(x)


@pytest.mark.parametrize("name", [name for name, (_, _, works) in REFUSED.items() if works])
def test_one_member_at_a_time_works_where_rows_do_not(name, filled, weights_of):
    model = filled(REFUSED[name][0]())
    population = Population(model.double(), sigma=0.1, population_size=4)
    x = torch.randn(12, *shape_of(name), dtype=torch.float64)
    got = population.forward(x, generation=1)
    assert population.mode in ("vmap", "loop")
    for p in range(4):
        own = torch.func.functional_call(model, weights_of(population, p, 1), x[3 * p : 3 * p + 3])
        torch.testing.assert_close(got[3 * p : 3 * p + 3], own, rtol=1e-6, atol=1e-7)


def test_the_text_names_parameter_operation_and_ways_out():
    population = Population(Model(lambda m, x: x * m.linear.bias.sum().item()), population_size=4)
    with pytest.raises(UnsupportedOperationError) as error, population.perturbed(0):
        population.model(torch.randn(4, 8))
    assert str(error.value) == (
        "parameter 'linear.bias' is perturbed and TensorBase.item turns it into float, which would have to differ "
        "between members. Ways out: leave the parameter alone (exclude=['linear.bias']), or evaluate one member at a "
        'time (mode="loop"), which works for every operation.'
    )
    excluded = Population(population.model, population_size=4, exclude=["linear.bias"])
    excluded.verify(torch.randn(4, 8))


def test_ambiguous_sizes_are_refused_when_there_was_nothing_to_learn_from():
    """Called by parts that are no modules of their own, there is no first call to learn from."""
    model = Model(lambda m, x: x, positions=(8, 8))
    population = Population(model, population_size=4, rank=1)
    message = "its sizes do not tell whether it holds the members"
    with population.perturbed(0):
        assert F.linear(torch.randn(4, 3, 8), model.positions).shape == (4, 3, 8)
        # time-major, or rows with another dimension folded in?
        with pytest.raises(UnsupportedOperationError, match=message):
            F.linear(torch.randn(3, 4, 8), model.positions)


def test_written_copies_are_copies(agree, filled):
    agree(filled(Model(written_copy)), ((torch.randn(2, 8),), {}))


def test_large_parameters_are_not_materialized_for_all_members():
    population = Population(Model(lambda m, x: x @ torch.linalg.pinv(m.linear.weight)), population_size=4)
    with population.perturbed(0) as active:
        active.context.max_dense_bytes = 512
        with pytest.raises(UnsupportedOperationError, match=r"4 materialized copies of \(8, 8\) would take"):
            population.model(torch.randn(4, 8))


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(2, 8))])
def test_torchscript_parameters_are_refused_when_the_population_is_made(make):
    model = nn.Sequential(nn.Linear(8, 8), make(nn.Linear(8, 8)))
    with pytest.raises(UnsupportedOperationError, match=r"1\.weight, 1\.bias belong to a TorchScript module"):
        Population(model, population_size=4)
    population = Population(model, population_size=4, exclude=["1"])
    assert population.verify(torch.randn(4, 8)) < 1e-5


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Dropout(0.1), "Dropout"),
        (nn.BatchNorm1d(8), "BatchNorm1d"),
        (nn.RReLU(), "RReLU"),
        (nn.InstanceNorm1d(8, track_running_stats=True), "InstanceNorm1d"),
        (nn.LSTM(8, 8, 2, dropout=0.1), "LSTM"),
        (nn.MultiheadAttention(8, 2, dropout=0.1), "MultiheadAttention"),
    ],
)
def test_training_mode(layer, name):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    population = Population(model, population_size=4)
    message = rf"the model is in training mode with 1 \({name}\).*Call model\.eval\(\) first"
    with pytest.raises(UnsupportedOperationError, match=message), population.perturbed(0):
        pass
    model.eval()
    with population.perturbed(0):
        pass


def test_training_mode_without_noise_is_fine(filled):
    model = filled(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0), nn.LayerNorm(8))).train()
    assert Population(model, population_size=4).verify(torch.randn(4, 8)) < 1e-5


class Curious(nn.Module):
    """Code that looks at its parameters in the ways that model code does."""

    def __init__(self):
        super().__init__()
        self.linear, self.extra = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        weight = self.linear.weight
        if isinstance(weight, Value):  # and not the plain tensors of a functional call
            assert isinstance(weight, nn.Parameter)
            assert isinstance(self.extra, nn.Parameter)
            assert weight in {weight}
            assert "PerturbedWeight" in repr(weight)
        assert weight.shape == (8, 8)
        assert weight.shape[0] == weight.size(0) == len(weight) == 8
        assert weight.dtype == next(self.parameters()).dtype == x.dtype
        assert weight.device == x.device
        assert weight.is_floating_point()
        assert weight.numel() == 64
        assert weight.dim() == weight.ndim == 2
        assert not weight.requires_grad
        assert self.linear.bias is not None
        assert [name for name, _ in self.named_parameters()] == ["extra", "linear.weight", "linear.bias"]
        assert torch.is_tensor(weight)
        assert weight is self.linear.weight
        state = weight.new_zeros(len(x), 8) + torch.zeros_like(self.extra)
        copied = copy.deepcopy(self.linear)
        return copied(x.to(weight.dtype) + state).type_as(weight) + self.extra.detach().data.to(x.device)


def test_code_that_looks_at_its_parameters(agree, filled):
    model = filled(Curious())
    model.requires_grad_(False)
    agree(model, ((torch.randn(2, 8),), {}))


def test_texts_name_nothing_of_the_small_first_call(filled):
    """The numbers of members and rows of that call are not the user's, and neither is advice for other models."""
    batched = Model(lambda m, x: torch.einsum("ij,jk->ik", m.w, x.sum(0, keepdim=True).t() * m.linear.bias), w=(8, 8))
    for model in (batched, StackedExperts()):
        population = Population(filled(model), population_size=4)
        with pytest.raises(UnsupportedOperationError) as error, population.perturbed(0):
            model(torch.randn(12, 8))
        assert not re.search(r"\b(5|7|11|13|17|19|23)\b", str(error.value))
        assert "set_experts_implementation" not in str(error.value)
