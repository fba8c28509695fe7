"""Every quantized format against float64: members, codes and quanta, and the library's own modules given back."""

import copy

import pytest
import torch
from quantized_layers import ROWS, adopted, gguf_blocks, quantized
from torch import nn

from eggroll.core.config import ESConfig
from eggroll.core.oracle import perturbation
from eggroll.torch import Population, Replica
from eggroll.torch.quantized.adopt import adopt, grids, released
from eggroll.torch.quantized.gguf import GgufGrid
from eggroll.torch.quantized.grid import by_group
from eggroll.torch.quantized.tensor import QuantizedTensor, as_parameter

NAMES = list(ROWS)
DTYPES = [torch.float32, torch.bfloat16]
N, M, MEMBERS, OWN = 128, 64, 4, 3


def net(dtype=torch.float32):
    """A linear layer, after a norm that is left alone and says what dtype activations have."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.LayerNorm(N), nn.Linear(N, M))
    nn.init.normal_(model[1].bias, std=0.2)
    return model.to(dtype).eval().requires_grad_(False)


def population(model, rank=1, **settings):
    return Population(
        model, population_size=MEMBERS, sigma=0.05, rank=rank, seed=7, kinds=("matrix",), target_modules=["1.weight"],
        **settings,
    )  # fmt: skip


def bound(row, x, weight, noise, dtype):
    """How far one member's product may be from the exact one, ``(rows, m)``.

    Sums of n products have a relative error of n eps of what is summed. In bfloat16 the unpacked weight, the factors,
    the product, the term and the sum are rounded once each. Activations rounded to 8 bits are off by half of
    1/127 of the row's largest, and so is the product by that times the sum of the weights' sizes.
    """
    sizes = x.abs() @ (weight.abs() + noise.abs()).T + 0.2
    unit = N * 2.0**-24 if dtype == torch.float32 else 6 * 2.0**-9
    allowed = unit * sizes
    if not row.exact:
        allowed = allowed + (0.51 / 127 + 2.0**-10) * x.abs().amax(-1, keepdim=True) * weight.abs().sum(-1)
    return allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("name", NAMES)
def test_members(name, rank, dtype):
    model = adopted(name, net(dtype), dtype)
    assert model[1].weight.dtype == dtype
    assert model[1].weight.shape == (M, N)
    made = population(model, rank)
    x = torch.randn(MEMBERS * OWN, N, dtype=dtype)
    with made.perturbed(2) as active:
        got = active.split(model(x)).double()
    seen = active.split(model[0](x)).double()
    (spec,), weight, bias = made.specs, grids(model)["1.weight"].dequantized().double(), model[1].bias.double()
    for p in range(MEMBERS):
        noise = 0.05 * torch.from_numpy(perturbation(spec, p, rank=rank, seed=7, generation=2))
        expected = seen[p] @ (weight + noise).T + bias
        assert ((got[p] - expected).abs() <= bound(ROWS[name], seen[p], weight, noise, dtype)).all()
        # and the noise is there: without it, members would be further off
        assert (got[p] - seen[p] @ weight.T - bias).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_modes(name):
    model = adopted(name, net())
    x = torch.randn(MEMBERS * OWN, N)
    outputs = {mode: population(model, 2, mode=mode).forward(x, generation=1) for mode in ("rows", "vmap", "loop")}
    for mode in ("vmap", "loop"):
        torch.testing.assert_close(outputs[mode], outputs["rows"], rtol=1e-5, atol=1e-5)
    auto = population(model, 2)
    torch.testing.assert_close(auto.forward(x, generation=1), outputs["rows"], rtol=1e-5, atol=1e-5)
    assert auto.mode == "rows"


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_librarys(name):
    """The dequantized weight is what the library itself makes of its tensors, and codes give it bit by bit."""
    plain = net()
    raw = quantized(name, plain)
    own = theirs(name, copy.deepcopy(raw[1]))
    adopt(raw)
    grid = grids(raw)["1.weight"]
    torch.testing.assert_close(grid.dequantized(), own, rtol=2**-23, atol=1e-8)
    rows = torch.tensor([5, 0, 5, 63])
    assert torch.equal(grid.dequantized(rows=rows), grid.dequantized()[rows])
    assert torch.equal(grid.dequantized(rows=slice(8, 24)), grid.dequantized()[8:24])
    # nothing is further from the plain weight than about a level is wide
    coarsest = by_group(grid.quanta(), N)
    assert ((grid.dequantized() - plain[1].weight).abs() <= 1.01 * coarsest.abs().amax(1, keepdim=True)).all()
    code, shared = grid.bits
    assert code == (8 if name.startswith("torchao") or "int8" in name or "8_" in name or "W8A8" in name else 4)
    assert 0 < shared <= 2


def theirs(name, module):
    if name.startswith("torchao"):
        return module.weight.dequantize()
    if name.startswith("GGUF"):
        import gguf

        grid = module.weight.grid
        kind = gguf.GGMLQuantizationType[grid.kind.name]
        return torch.from_numpy(gguf.quants.dequantize(grid.blocks.numpy(), kind).copy())
    if name.startswith("compressed"):
        from compressed_tensors.compressors import decompress_module

        decompress_module(module)
        return module.weight.data
    if name.startswith("GPTQ"):
        return by_the_words(module)
    import bitsandbytes.functional as functional

    if "int8" in name:
        return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def by_the_words(module):
    """GPTQ's description, number by number."""
    bits, m = 4 if module.qweight.shape[0] == N // 8 else 8, module.qweight.shape[1]
    per_word, mask = 32 // bits, 2**bits - 1
    weight = torch.empty(m, N)
    for row in range(N):
        group = int(module.g_idx[row])
        for column in range(m):
            code = int(module.qweight[row // per_word, column]) >> (bits * (row % per_word)) & mask
            zero = int(module.qzeros[group, column // per_word]) >> (bits * (column % per_word)) & mask
            weight[column, row] = float(module.scales[group, column]) * (code - zero - (2 - module.version))
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_codes(name):
    grid = grids(adopted(name, net()))["1.weight"]
    before, codes = grid.stored.clone(), grid.codes()
    assert codes.dtype in (torch.int8, torch.uint8)
    assert int(codes.min()) >= grid.low
    assert int(codes.max()) <= grid.high
    grid.set_codes(codes)
    assert torch.equal(grid.stored, before)
    for value in (grid.low, grid.high):
        grid.set_codes(torch.full_like(codes, value))
        assert (grid.codes() == value).all()
    grid.set_codes(codes)
    delta = torch.randint(-3, 4, codes.shape)
    delta = (codes.int() + delta).clamp(grid.low, grid.high) - codes.int()
    grid.move(delta)
    assert torch.equal(grid.codes().int(), codes.int() + delta)
    grid.move(-delta)
    assert torch.equal(grid.codes(), codes)


@pytest.mark.parametrize("name", NAMES)
def test_a_code_up_is_a_quantum_more(name):
    grid = grids(adopted(name, net()))["1.weight"]
    before, codes = grid.dequantized(), grid.codes()
    quanta = by_group(grid.quanta(), N)
    assert quanta.shape == codes.shape
    up = torch.where(codes == grid.high, -1, 1)
    grid.move(up)
    change = grid.dequantized() - before
    torch.testing.assert_close(change, up * quanta, rtol=1e-4, atol=2e-6)
    grid.set_codes(codes)
    one = torch.zeros_like(up)
    one[11, 37] = up[11, 37]
    grid.move(one)
    changed = (grid.dequantized() != before).nonzero().tolist()
    assert changed == [[11, 37]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.adopts])
def test_given_back(name, dtype):
    raw = quantized(name, net(dtype), dtype)
    before = {key: value.clone() for key, value in contents(raw).items()}
    kind, x = type(raw[1]), torch.randn(5, N, dtype=dtype)
    compressed = name.startswith("compressed")
    assert adopt(raw) == 1
    assert adopt(raw) == 0  # nothing is left to take
    ours = raw(x)
    with released(raw):
        assert type(raw[1]) is kind
        assert not any(isinstance(p, QuantizedTensor) for p in raw.parameters())
        after = contents(raw)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        if not compressed:  # whose library expands them then
            own = raw(x)
    if compressed:
        own = raw[0](x) @ theirs(name, quantized(name, net(dtype), dtype)[1]).T + raw[1].bias
    weight, seen = grids(raw)["1.weight"].dequantized(), raw[0](x).float()
    # bitsandbytes computes 4-bit products in bfloat16 on some CPUs, whatever the activations are
    coarse = torch.bfloat16 if name.startswith("bitsandbytes") and "int8" not in name else dtype
    allowed = 2 * bound(ROWS[name], seen, weight, torch.zeros_like(weight), coarse)
    assert ((ours.float() - own.float()).abs() <= allowed).all()
    assert torch.equal(raw(x), ours)  # whatever was done to the library's modules
    codes = grids(raw)["1.weight"].codes()
    grids(raw)["1.weight"].set_codes(torch.zeros_like(codes))
    with released(raw):
        moved = contents(raw)
        changed = [key for key in before if not torch.equal(moved[key], before[key])]
        assert len(changed) == 1  # the codes, and nothing else


def contents(model):
    """Every tensor that a model's libraries would save."""
    found = {}
    for key, value in model.state_dict().items():
        parts = getattr(value, "tensor_data_names", None)  # torchao's tensors hold several
        found |= {f"{key}.{part}": getattr(value, part) for part in parts} if parts else {key: value}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_their_own(name):
    model = adopted(name, net())
    x = torch.randn(4, N)
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    grid = grids(twin)["1.weight"]
    grid.set_codes(torch.full_like(grid.codes(), grid.high))
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    if ROWS[name].adopts:
        changed = contents_released(twin)
        assert any(not torch.equal(changed[key], value) for key, value in contents_released(model).items())


def contents_released(model):
    with released(model):
        return {key: value.clone() for key, value in contents(model).items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_moves_codes_within_their_range(name):
    model = adopted(name, net())
    grid = grids(model)["1.weight"]
    codes, quanta = grid.codes(), grid.quanta().clone()
    config = ESConfig(population_size=8, rank=1, sigma=0.05, lr=0.5, optimizer="sgd", target_modules=["1.weight"])
    replica = Replica(model, config)
    x, target = torch.randn(8, N), torch.randn(8, M)

    def fitness(model, active):
        return -(active.split(model(active.expand(x))) - target).square().mean(dim=(1, 2))

    for _ in range(3):
        replica.step(fitness)
    moved = grid.codes()
    assert not torch.equal(moved, codes)
    assert int(moved.min()) >= grid.low
    assert int(moved.max()) <= grid.high
    assert not grid.uniform or torch.equal(grid.quanta(), quanta)
    assert torch.equal(replica.state_tensors()["parameter/1.weight"], grid.stored)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_rows_of_an_embedding(kind):
    torch.manual_seed(3)
    table = nn.Embedding(50, 64)
    table._parameters["weight"] = as_parameter(GgufGrid(gguf_blocks(kind, table.weight.detach()), kind, torch.float32))
    model = nn.Sequential(table, nn.Linear(64, 5)).eval().requires_grad_(False)
    made = Population(model, population_size=4, sigma=0.1, rank=2, seed=1, target_modules=["0.weight"])
    ids = torch.randint(0, 50, (8, 3))
    with made.perturbed(0) as active:
        got = active.split(model(ids))
    (spec,), center = made.specs, table.weight.grid.dequantized()
    assert spec.kind == "embedding"
    for p in range(4):
        noise = torch.from_numpy(perturbation(spec, p, rank=2, seed=1, generation=0)).float()
        expected = model[1]((center + 0.1 * noise)[ids[2 * p : 2 * p + 2]])
        torch.testing.assert_close(got[p], expected, rtol=1e-4, atol=1e-5)


def test_tied_and_shared_weights_are_taken_once():
    raw = quantized("bitsandbytes nf4", nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
    raw.append(raw[0])  # the same module twice
    tied = quantized("torchao int8", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    tied[1].weight = tied[0].weight  # the same tensor in two modules
    for model, same in ((raw, lambda m: m[0] is m[2]), (tied, lambda m: m[0].weight is m[1].weight)):
        assert adopt(model) == 1
        assert len(grids(model)) == 1
        assert same(model)
        with released(model):
            assert same(model)
        assert same(model)
