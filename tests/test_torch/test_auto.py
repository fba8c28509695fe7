"""``mode="auto"`` ends in an answer for every model that answers, and says once how it got there and what it costs."""

import logging

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from eggroll.errors import ConfigError
from eggroll.torch import Population


class Rescaling(nn.Module):
    """Rescales its weights at its first call in evaluation mode, as RWKV-4 does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
        self.is_rescaled = False

    def forward(self, x):
        if not self.is_rescaled:
            self.first.weight.div_(2)
            self.second.weight.data = self.second.weight.data * 0.5
            self.is_rescaled = True
        return self.second(torch.tanh(self.first(x)))


class BlockLinear(nn.Linear):
    """A linear layer over fixed blocks of rows, padded: a result per row, from rows of several members together."""

    block = 32

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        padded = F.pad(flat, (0, 0, 0, -len(flat) % self.block)).view(-1, self.block, x.shape[-1])
        out = torch.cat([part @ self.weight.t() for part in padded.unbind(0)])
        return out[: len(flat)].view(*x.shape[:-1], -1) + (0 if self.bias is None else self.bias)


class TokenShift(nn.Module):
    """RWKV-7 as its remote code is written: blocks of rows, mixing with the token before, by concatenation."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(30, 8), nn.Parameter(torch.rand(1, 1, 8))
        self.receptance, self.head = BlockLinear(8, 8, bias=False), BlockLinear(8, 30)
        self.state = {}

    def forward(self, ids):
        x = self.embedding(ids)
        last = self.state.get("x", torch.zeros_like(x[:, :1]))
        shifted = torch.cat([last, x[:, :-1]], dim=1)
        x = torch.lerp(x, shifted, self.mix)
        return self.head(torch.sigmoid(self.receptance(x)) * x)


class RunningMean(nn.Module):
    """Keeps a running mean of what it sees, also in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.scale = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.linear(x)
        self.mean.mul_(0.5).add_(y.mean(0), alpha=0.5)
        return (y - self.mean) * self.scale


class Changing(nn.Module):
    """Writes into its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x.mul_(2))


class Odd(nn.Module):
    """Raises what nobody expects as soon as a weight is no plain tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        if type(self.linear.weight) not in (torch.Tensor, nn.Parameter):
            raise KeyError(type(self.linear.weight).__name__)
        return self.linear(x)


def members_one_by_one(model_of, population, inputs, weights_of, generation):
    """The plain module with each member's weights from the oracle, a fresh one for each."""
    outputs = []
    for p, part in enumerate(inputs.clone().chunk(population.population_size)):
        plain = model_of()
        plain.load_state_dict({**plain.state_dict(), **weights_of(population, p, generation)})
        outputs.append(plain(part))
    return outputs


def rwkv():
    torch.manual_seed(3)
    config = transformers.RwkvConfig(
        vocab_size=30, hidden_size=8, attention_hidden_size=8, num_hidden_layers=3, rescale_every=1, context_length=16
    )
    return transformers.RwkvForCausalLM(config).double().eval()


ODD = {
    "weights rescaled in place": (Rescaling, lambda: torch.randn(12, 8).double(), {}),
    "some of its weights rescaled": (Rescaling, lambda: torch.randn(12, 8).double(), {"exclude": ["first.weight"]}),
    "RWKV-4": (rwkv, lambda: torch.randint(30, (4, 5)), {}),
    "blocks of rows": (TokenShift, lambda: torch.randint(30, (12, 5)), {}),
    "a running mean": (RunningMean, lambda: torch.randn(12, 8).double(), {}),
    "a changed input": (Changing, lambda: torch.randn(12, 8).double(), {}),
    "another exception": (Odd, lambda: torch.randn(12, 8).double(), {}),
}


@pytest.mark.parametrize("mode", ["loop", "auto"])
@pytest.mark.parametrize("name", ODD)
def test_every_model_ends_in_an_answer(name, mode, filled, weights_of):
    build, inputs, options = ODD[name]
    start = filled(build()).double().state_dict()

    def model_of():
        model = build().double().eval()
        model.load_state_dict(start)
        return model

    model = model_of()
    population = Population(model, population_size=4, sigma=0.1, mode=mode, **options)
    x = inputs()
    given = x.clone()
    got = population.forward(x, generation=2)
    expected = members_one_by_one(model_of, population, given, weights_of, 2)
    leaves = zip(*(tree_flatten(own)[0] for own in [got, *expected]), strict=True)
    for mine, *theirs in leaves:
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, torch.cat(theirs), rtol=1e-6, atol=1e-7)
    assert torch.equal(x, given)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[key]), key
    assert not getattr(model, "is_rescaled", False)
    assert getattr(model, "calls", 0) == 0


def test_one_line_says_which_mode_why_and_what_it_costs(filled, caplog):
    population = Population(filled(Rescaling()).double(), population_size=4, sigma=0.1)
    x = torch.randn(8, 8, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="eggroll"):
        for generation in range(3):
            population.forward(x, generation=generation)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    text = record.getMessage()
    assert text.startswith('evaluating in mode="loop" (one member after the other): ')
    assert "for 4 members, where one alone takes" in text
    for other in ("rows", "vmap"):
        assert f"; not \"{other}\": parameter 'first.weight' is perturbed and would be changed in place" in text
    assert "\n" not in text


def test_rows_say_so_quietly(filled, caplog):
    population = Population(filled(nn.Sequential(nn.Linear(8, 3))), population_size=4, sigma=0.1)
    with caplog.at_level(logging.INFO, logger="eggroll"):
        population.forward(torch.randn(8, 8), generation=0)
        population.forward(torch.randn(8, 8), generation=1)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().startswith('evaluating in mode="rows" (all members as rows of one batch): ')
    assert "times as fast as one after the other" in record.getMessage()


def test_later_inputs_that_the_mode_cannot_run_go_through_the_next_one(filled, weights_of, caplog):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, x):
            if x.shape[0] % 3 == 0 and type(self.linear.weight) is not torch.Tensor:
                raise KeyError("three")
            return self.linear(x)

    population = Population(filled(Sometimes()).double(), population_size=4, sigma=0.1)
    population.forward(torch.randn(8, 8, dtype=torch.float64), generation=0)
    x = torch.randn(12, 8, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="eggroll"):
        got = [population.forward(x, generation=0) for _ in range(2)][1]
    assert population.mode == "rows"
    assert len(caplog.records) == 1
    for p in range(4):
        rows = slice(3 * p, 3 * p + 3)
        weights = weights_of(population, p, 0)
        torch.testing.assert_close(got[rows], F.linear(x[rows], weights["linear.weight"], weights["linear.bias"]))


def test_what_the_model_itself_cannot_run_is_its_own_error(filled):
    population = Population(filled(nn.Linear(8, 3)), population_size=4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        population.forward(torch.randn(8, 7), generation=0)
    with pytest.raises(ConfigError, match="must be a multiple of the number of members"):
        population.forward(torch.randn(6, 8), generation=0)
    assert population.mode == "auto"
