"""Mixtures of experts that pick their tokens and put them back: every member as it is alone, in rows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population

EXPERTS, TOP = 4, 2


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(4, 6, bias=False)

    def forward(self, x):
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Mixture(nn.Module):
    """A router, experts as modules or as one stacked weight each, and a way to bring tokens there and back."""

    def __init__(self, way):
        super().__init__()
        self.way, self.router, self.head = way, nn.Linear(6, EXPERTS, bias=False), nn.Linear(6, 3)
        self.experts = nn.ModuleList([Expert() for _ in range(EXPERTS)])
        self.moe = nn.ParameterDict(
            {"up": torch.zeros(EXPERTS, 8, 6), "bias": torch.zeros(EXPERTS, 8), "down": torch.zeros(EXPERTS, 4, 6)}
        )

    def stacked(self, e, x):
        gate, up = (F.linear(x, self.moe["up"][e]) + self.moe["bias"][e]).chunk(2, -1)
        return (gate.relu() * up) @ self.moe["down"][e]

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        gates, chosen = self.router(tokens).softmax(-1).topk(TOP, dim=-1)
        return self.head(self.way(self, tokens, gates, chosen).view(x.shape) + x)


def by_module(m, x, gates, chosen):
    """As Mixtral once did."""
    out, mask = torch.zeros_like(x), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for e, expert in enumerate(m.experts):
        which, token = torch.where(mask[e])
        picked = x[None, token].reshape(-1, x.shape[-1])
        out.index_add_(0, token, (expert(picked) * gates[token, which, None]).to(out.dtype))
    return out


def by_mask(m, x, gates, chosen):
    """As DeepSeek's first code does: boolean masks, written by an index."""
    flat, out = x.repeat_interleave(TOP, dim=0), torch.empty(len(x) * TOP, x.shape[-1], dtype=x.dtype)
    for e in range(EXPERTS):
        mine = chosen.flatten() == e
        out[mine] = m.stacked(e, flat[mine])
    return (out.view(*gates.shape, -1) * gates.unsqueeze(-1)).sum(1)


def by_sorting(m, x, gates, chosen):
    """As ScatterMoE and JetMoE do: one sorted list, cut into the experts' parts."""
    order = chosen.flatten().argsort()
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
    parts = x[order // TOP].split(counts, dim=0)
    done = torch.cat([m.stacked(e, part) for e, part in enumerate(parts)], dim=0) * gates.flatten()[order][:, None]
    return torch.zeros_like(x).index_add(0, order // TOP, done)


def in_order_again(m, x, gates, chosen):
    """Sorted, and sorted back by the inverse permutation."""
    order = chosen.flatten().argsort()
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
    parts = x.index_select(0, order // TOP).split(counts)
    done = torch.cat([m.experts[e](part) for e, part in enumerate(parts)])
    back = torch.empty_like(done)
    back = done[order.argsort()]
    return (back.reshape(*gates.shape, x.shape[-1]) * gates[..., None]).sum(dim=1)


def added_in_place(m, x, gates, chosen):
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, which = (chosen == e).nonzero(as_tuple=True)
        if len(token):
            out[token] += F.dropout(m.experts[e](x[token]), 0.1, m.training) * gates[token, which].unsqueeze(-1)
    return out


def scattered(m, x, gates, chosen):
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, which = torch.where(chosen == e)
        done = m.stacked(e, x[token]) * gates[token, which][:, None]
        out = out.scatter_add(0, token[:, None].expand(-1, x.shape[-1]), done)
    return out


def identity_experts(m, x, gates, chosen):
    """As LongCat has them: experts that do nothing."""
    out = torch.zeros_like(x)
    for e in chosen.unique():
        token, which = torch.where(chosen == e)
        picked = x[token]
        done = m.stacked(int(e), picked) if int(e) < EXPERTS // 2 else picked
        out.index_add_(0, token, done * gates[token, which, None])
    return out


WAYS = [by_module, by_mask, by_sorting, in_order_again, added_in_place, scattered, identity_experts]


@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_members_have_their_own_experts(way, own, filled, weights_of):
    model = filled(Mixture(way)).double()
    population = Population(model, population_size=6, sigma=0.3, rank=2)
    x = torch.randn(6 * own, 5, 6, dtype=torch.float64)
    joint = population.forward(x, generation=1)
    assert population.mode == "rows"
    with population.perturbed(1) as active, torch.no_grad():
        got = active.split(model(x))
    torch.testing.assert_close(got.flatten(0, 1), joint)
    for p in range(6):
        rows = x[own * p : own * (p + 1)]
        expected = torch.func.functional_call(model, weights_of(population, p, 1), (rows,))
        torch.testing.assert_close(got[p], expected, rtol=1e-5, atol=1e-6)


def test_tokens_that_finish_early(filled, weights_of):
    """Fewer rows than members have, while generating."""
    model = filled(Mixture(by_sorting)).double()
    population = Population(model, population_size=4, sigma=0.3)
    x = torch.randn(8, 5, 6, dtype=torch.float64)
    with population.perturbed(0) as active, torch.no_grad():
        model(x)
        active.select_rows(torch.tensor([0, 3, 3]))
        got = model(x[[0, 6, 7]])
    for row, (p, at) in zip(got, [(0, 0), (3, 6), (3, 7)], strict=True):
        expected = torch.func.functional_call(model, weights_of(population, p, 0), (x[at : at + 1],))
        torch.testing.assert_close(row, expected[0], rtol=1e-5, atol=1e-6)


def test_autocast_keeps_its_dtype(filled):
    model = filled(Mixture(by_module))
    population = Population(model, population_size=4, sigma=0.1)
    x = torch.randn(4, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), population.perturbed(0) as active:
        got = active.split(model(x))
    with population.perturbed(0) as active, torch.no_grad():
        torch.testing.assert_close(got.float(), active.split(model(x)), rtol=0.1, atol=0.1)


def reversed_rows(m, x, gates, chosen):
    return torch.zeros_like(x).index_add(0, torch.arange(len(x)).flip(0), m.experts[0](x[gates[:, 0].argsort()]))


def over_all_tokens(m, x, gates, chosen):
    out = torch.zeros_like(x)
    token = torch.where(chosen == 0)[0]
    return out.index_add(0, token, m.experts[0](x[token]) - x[token].mean(0))


def capacity(m, x, gates, chosen):
    """An expert takes its best three tokens, of whichever member."""
    token = gates[:, 0].topk(3).indices
    return torch.zeros_like(x).index_add(0, token, m.experts[0](x[token]))


@pytest.mark.parametrize("way", [reversed_rows, over_all_tokens, capacity])
def test_rows_that_meet_other_members_are_refused(way, filled, weights_of):
    model = filled(Mixture(way)).double()
    population = Population(model, population_size=4, sigma=0.3)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    with pytest.raises(UnsupportedOperationError, match='mode="loop"'), torch.no_grad():  # noqa: SIM117
        with population.perturbed(0):
            model(x)
    out = population.forward(x, generation=0)
    assert population.mode in ("vmap", "loop")
    for p in range(4):
        expected = torch.func.functional_call(model, weights_of(population, p, 0), (x[p : p + 1],))
        torch.testing.assert_close(out[p : p + 1], expected, rtol=1e-5, atol=1e-6)


def test_a_table_as_long_as_there_are_rows(filled, weights_of):
    """What is picked of a table, made in the model and with a row for every position, is the same for all members."""

    class Positions(Mixture):
        def forward(self, x):
            table = torch.linspace(0, 1, 8 * 6, dtype=x.dtype).view(8, 6)
            at = torch.where(torch.arange(8) < x.shape[1])[0]
            return super().forward(x + table[at])

    model = filled(Positions(by_module)).double()
    population = Population(model, population_size=4, sigma=0.3)
    x = torch.randn(8, 5, 6, dtype=torch.float64)  # 8 rows
    with population.perturbed(0) as active, torch.no_grad():
        got = active.split(model(x))
    for p in range(4):
        expected = torch.func.functional_call(model, weights_of(population, p, 0), (x[2 * p : 2 * p + 2],))
        torch.testing.assert_close(got[p], expected, rtol=1e-5, atol=1e-6)


def masked(m, x, gates, chosen):
    """Also experts without a single token are called."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = chosen[:, 0] == (e if e != 1 else -1)
        out[mask] = expert(x[mask])
    return out


def one_token_each(m, x, gates, chosen):
    return torch.cat([m.experts[0](x[:0]), *(m.experts[int(e)](x[i : i + 1]) for i, e in enumerate(chosen[:, 0]))])


@pytest.mark.parametrize("members", [4, 6])
def test_an_expert_without_tokens(members, filled, weights_of):
    model = filled(Mixture(masked)).double()
    population = Population(model, population_size=members, sigma=0.3)
    x = torch.randn(members, 2, 6, dtype=torch.float64)
    got = population.forward(x, generation=0)
    assert population.mode == "rows"
    for p in range(members):
        expected = torch.func.functional_call(model, weights_of(population, p, 0), (x[p : p + 1],))
        torch.testing.assert_close(got[p : p + 1], expected, rtol=1e-5, atol=1e-6)


def test_rows_taken_by_slices_are_still_checked(filled, weights_of):
    model = filled(Mixture(one_token_each)).double()
    population = Population(model, population_size=4, sigma=0.3)
    x = torch.randn(8, 5, 6, dtype=torch.float64)
    got = population.forward(x, generation=0)
    assert population.mode in ("vmap", "loop")
    for p in range(4):
        expected = torch.func.functional_call(model, weights_of(population, p, 0), (x[2 * p : 2 * p + 2],))
        torch.testing.assert_close(got[2 * p : 2 * p + 2], expected, rtol=1e-5, atol=1e-6)
