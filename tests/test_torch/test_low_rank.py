"""The low-rank term in C and in plain operations, against float64."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

from eggroll.torch import Population, low_rank
from eggroll.torch.kernels import low_rank_c

NEEDS_COMPILER = pytest.mark.skipif(bool(low_rank_c.why_not()), reason=str(low_rank_c.why_not()))
# Members, rows per member, n, m: one row each, odd sizes, sizes around those of vectors, one row, one member, nothing.
SHAPES = [
    (4, 1, 64, 64), (3, 5, 67, 31), (2, 3, 1, 1), (1, 1, 129, 65), (1, 7, 16, 17), (5, 2, 15, 200), (32, 4, 192, 96),
    (0, 0, 8, 8), (3, 0, 8, 8), (2, 2, 0, 5), (2, 2, 5, 0),
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def case(members, per_member, n, m, rank=1, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(members * per_member, n).to(dtype)
    out = torch.randn(members * per_member, m).to(dtype)
    return out, x, torch.randn(members, m, rank).to(dtype), torch.randn(members, n, rank).to(dtype)


def exact(out, x, a, b):
    rows = out.shape[0] // max(len(a), 1)
    a, b = (part.double().repeat_interleave(rows, 0) for part in (a, b))
    return out.double() + torch.einsum("rmk,rk->rm", a, torch.einsum("rn,rnk->rk", x.double(), b))


def eager(out, x, a, b):
    members = len(a)
    if out.numel() == 0:
        return out
    rows = len(out) // members
    low_rank.add_low_rank_(out.view(members, rows, -1), x.view(members, rows, x.shape[-1]), a, b)
    return out


def worst(got, expected):
    return (got.double() - expected).abs().max().item() if got.numel() else 0.0


@pytest.fixture(params=["one thread", "threads"])
def threads(request, monkeypatch):
    """Calls on one thread, and shared out however small they are."""
    before = torch.get_num_threads()
    if request.param == "threads":
        torch.set_num_threads(2)
        monkeypatch.setattr(low_rank_c, "PARALLEL_FROM", 0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """What the calls of the C library answered: True where it did the work."""
    answers = []
    for name in ("can_add", "add_gathered_"):
        real = getattr(low_rank_c, name)
        monkeypatch.setattr(low_rank_c, name, lambda *args, real=real: answers.append(real(*args)) or answers[-1])
    return answers


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_term_is_as_exact_as_plain_operations(shape, rank, dtype, threads):
    out, x, a, b = case(*shape, rank, dtype)
    expected, plain = exact(out, x, a, b), eager(out.clone(), x, a, b)
    assert low_rank_c.add_(out, x, a, b)
    slack = TOLERANCE[dtype] * (expected.abs().max().item() if expected.numel() else 0)
    assert worst(out, expected) <= max(2 * worst(plain, expected), slack)


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_views_that_start_anywhere_in_memory(dtype):
    """Addresses that are no multiple of a vector's size, and neighbors that stay as they are."""
    out, x, a, b = case(3, 2, 37, 29, 1, dtype)
    held = [torch.full((part.numel() + 3,), 7.0, dtype=dtype) for part in (out, x, a, b)]
    views = [memory[1:-2].view(part.shape).copy_(part) for memory, part in zip(held, (out, x, a, b), strict=True)]
    expected = exact(out, x, a, b)
    assert low_rank_c.add_(*views)
    assert worst(views[0], expected) <= TOLERANCE[dtype] * expected.abs().max()
    assert all(memory[0] == 7 and (memory[-2:] == 7).all() for memory in held)
    assert torch.equal(views[1], x)


@NEEDS_COMPILER
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_infinities_and_nan_stay_what_they_are(value, dtype):
    out, x, a, b = case(2, 1, 40, 40, 1, dtype)
    out[0, 3] = value
    low_rank_c.add_(out, x, a, b)
    torch.testing.assert_close(out[0, 3].item(), value, equal_nan=True)
    assert out.isfinite().sum() == out.numel() - 1
    x[1, 5] = math.nan
    low_rank_c.add_(out, x, a, b)
    assert out[1].isnan().all()
    assert not out[0, :3].isnan().any()


@NEEDS_COMPILER
def test_bfloat16_is_rounded_to_the_nearest_even():
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    base = torch.tensor([1.0, 1 + 2**-7, -1.0, -1 - 2**-7, 2**127]).bfloat16().view(5, 1)
    term = torch.tensor([2.0**-8, 2.0**-8, -(2.0**-8), -(2.0**-8), 2**127]).bfloat16().view(5, 1)
    expected = (base.float() + term.float()).bfloat16()
    low_rank_c.add_(base, term, one, one)
    assert torch.equal(base, expected)


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 4, 8, 17])
@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
def test_linear_uses_it_and_agrees_with_plain_operations(middle, rank, dtype, calls, monkeypatch):
    torch.manual_seed(1)
    x, weight, bias = torch.randn(8, *middle, 48).to(dtype), torch.randn(33, 48).to(dtype), torch.randn(33).to(dtype)
    _, _, a, b = case(4, 2, 48, 33, rank, dtype)
    got = low_rank.linear(x, weight, a, b, bias)
    many = dtype == torch.bfloat16 and rank > 1 and rank * 2 * math.prod(middle) > low_rank_c.MAX_COLUMNS_BF16
    assert calls == [rank <= low_rank_c.MAX_RANK and not many]
    monkeypatch.setattr(low_rank_c, "add_", lambda *args: False)
    expected = low_rank.linear(x, weight, a, b, bias)
    assert got.shape == (8, *middle, 33)
    assert worst(got, expected.double()) <= 4 * TOLERANCE[dtype] * expected.double().abs().max()


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 5)])
def test_embedding_uses_it_and_agrees_with_plain_operations(shape, rank, dtype, calls, threads, monkeypatch):
    torch.manual_seed(1)
    ids, weight = torch.randint(50, shape), torch.randn(50, 19).to(dtype)
    _, _, a, b = case(3, 1, 19, 50, rank, dtype)
    got = low_rank.embedding(ids, weight, a, b)
    assert calls == [True]
    rows = a.double()[torch.arange(6) // 2].reshape(6, 1, 50, rank).expand(6, ids.numel() // 6, 50, rank)
    chosen = rows.gather(2, ids.view(6, -1, 1, 1).expand(-1, -1, 1, rank)).squeeze(2)
    reference = F.embedding(ids.view(6, -1), weight).double() + chosen @ b.double()[torch.arange(6) // 2].mT
    monkeypatch.setattr(low_rank_c, "add_gathered_", lambda *args: False)
    plain = low_rank.embedding(ids, weight, a, b)
    slack = TOLERANCE[dtype] * reference.abs().max().item()
    reference = reference.view(got.shape)
    assert worst(got, reference) <= max(2 * worst(plain, reference), slack)


@NEEDS_COMPILER
def test_rows_that_are_not_one_block_of_memory_are_left_to_plain_operations():
    out, x, a, b = case(4, 1, 16, 16)
    before = out.clone()
    wide = torch.randn(4, 32)
    assert not low_rank_c.add_(out, wide[:, ::2], a, b)
    assert not low_rank_c.add_(out.t(), x, a, b)
    assert not low_rank_c.add_(out, x.double(), a.double(), b.double())
    assert not low_rank_c.add_(out, x.bfloat16(), a, b)
    assert not low_rank_c.add_(out, x, a.bfloat16(), b)
    assert not low_rank_c.add_(out.half(), x.half(), a.half(), b.half())
    assert not low_rank_c.add_gathered_(out, torch.zeros(4, dtype=torch.int32), a, b)
    assert torch.equal(out, before)


@NEEDS_COMPILER
def test_shapes_that_do_not_fit_never_reach_the_library():
    """A bias that broadcasts, or factors of fewer members, would be read past their ends."""
    out, x, a, b = case(4, 2, 16, 12)
    for bias in (torch.ones(1), torch.ones(1, 12), torch.ones(2, 12), torch.ones(16)):
        assert not low_rank_c.add_(out, x, a, b, bias)
        assert not low_rank_c.add_shared(out.view(4, 2, 12), out[:2].clone(), x[:2], a, b, bias)
    assert not low_rank_c.add_(out, x, a, b[:2])
    assert not low_rank_c.add_(out, x, a, b.expand(4, 16, 2))
    weight = torch.randn(12, 16)
    expected = low_rank.linear(x, weight, a, b) + 1
    torch.testing.assert_close(low_rank.linear(x, weight, a, b, torch.ones(1)), expected)


@NEEDS_COMPILER
def test_factors_may_lie_in_any_order_in_memory():
    out, x, _, _ = case(4, 3, 24, 40, 3)
    strided, repeated = torch.randn(4, 80, 3)[:, ::2], torch.randn(1, 24, 3).expand(4, 24, 3)
    expected = exact(out, x, strided, repeated)
    assert low_rank_c.add_(out, x, strided, repeated)
    assert worst(out, expected) <= TOLERANCE[torch.float32] * expected.abs().max()


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("kind", ["none", "shared", "own"])
def test_linear_in_blocks_adds_the_bias_of_all_members_or_of_each(kind, rank, dtype, monkeypatch):
    """Blocks of three members, so that the last one is smaller; against float64, and as exact as plain operations."""
    monkeypatch.setattr(low_rank, "BLOCK_BYTES", 3 * 5 * (19 + 33) * dtype.itemsize)
    torch.manual_seed(2)
    x, weight = torch.randn(8 * 5, 19).to(dtype), torch.randn(33, 19).to(dtype)
    _, _, a, b = case(8, 5, 19, 33, rank, dtype)
    bias = {"none": None, "shared": torch.randn(33).to(dtype), "own": torch.randn(8, 33).to(dtype)}[kind]
    added = 0 if bias is None else (bias if kind == "shared" else bias.repeat_interleave(5, 0)).double()
    expected = exact(x.double() @ weight.double().T + added, x, a, b)
    got = low_rank.linear(x, weight, a, b, bias)
    monkeypatch.setattr(low_rank_c, "can_add", lambda *args: False)
    plain = low_rank.linear(x, weight, a, b, bias)
    assert worst(got, expected) <= max(2 * worst(plain, expected), TOLERANCE[dtype] * expected.abs().max().item())


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 3, 17])
@pytest.mark.parametrize("kind", ["none", "shared", "own"])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3)])
def test_an_input_of_all_members_is_multiplied_once(batch, kind, rank, dtype, threads, monkeypatch):
    torch.manual_seed(3)
    x, weight = torch.randn(*batch, 19).to(dtype), torch.randn(33, 19).to(dtype)
    _, _, a, b = case(4, 1, 19, 33, rank, dtype)
    bias = {"none": None, "shared": torch.randn(33).to(dtype), "own": torch.randn(4, 33).to(dtype)}[kind]
    rows = x.reshape(-1, 19).repeat(4, 1)
    added = 0 if bias is None else (bias.expand(4, 33)).double().repeat_interleave(len(rows) // 4, 0)
    expected = exact(rows.double() @ weight.double().T + added, rows, a, b).view(4, *batch, 33)
    got = low_rank.linear_shared(x, weight, a, b, bias)
    monkeypatch.setattr(low_rank_c, "add_shared", lambda *args: False)
    plain = low_rank.linear_shared(x, weight, a, b, bias)
    assert got.shape == plain.shape == expected.shape
    assert worst(got, expected) <= max(2 * worst(plain, expected), TOLERANCE[dtype] * expected.abs().max().item())


def rank_major(factor):
    return factor.transpose(1, 2).contiguous().transpose(1, 2)


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("kind", ["none", "shared", "own"])
@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3)])
def test_a_weight_looked_at_once_gives_the_same_bits(batch, kind, rank, dtype, threads, monkeypatch):
    torch.manual_seed(4)
    x, weight = torch.randn(4 * batch[0], *batch[1:], 19).to(dtype), torch.randn(33, 19).to(dtype)
    a, b = (rank_major(factor) for factor in case(4, 1, 19, 33, rank, dtype)[2:])
    bias = {"none": None, "shared": torch.randn(33).to(dtype), "own": torch.randn(4, 33).to(dtype)}[kind]
    expected = low_rank.linear(x, weight, a, b, bias)
    product, added = low_rank.Product(weight, a, b), []
    real = low_rank_c.Term.add_
    monkeypatch.setattr(low_rank_c.Term, "add_", lambda *args: added.append(real(*args)))
    for _ in range(2):
        got = product(x, bias)
        assert got.shape == expected.shape
        assert torch.equal(got, expected)
    many = dtype == torch.bfloat16 and rank * math.prod(batch) > low_rank_c.MAX_COLUMNS_BF16 and rank > 1
    assert len(added) == 2 * (not many)
    # Rows, a bias or a size that the quick way does not take; it is asked anew at each call.
    strided = torch.randn(*x.shape[:-1], 38).to(dtype)[..., ::2]
    assert torch.equal(product(strided, bias), low_rank.linear(strided, weight, a, b, bias))
    assert torch.equal(
        product(x, torch.ones(1, dtype=dtype)), low_rank.linear(x, weight, a, b, torch.ones(1).to(dtype))
    )
    assert product(x[:0], bias).shape == (0, *expected.shape[1:])
    monkeypatch.setattr(low_rank, "BLOCK_BYTES", 64)
    added.clear()
    assert torch.equal(product(x, bias), low_rank.linear(x, weight, a, b, bias))
    assert not added


@NEEDS_COMPILER
def test_what_the_quick_way_does_not_take():
    _, x, a, b = case(4, 2, 16, 12, 3)
    weight, a, b = torch.randn(12, 16), rank_major(a), rank_major(b)
    term = low_rank_c.prepare(weight, a, b)
    assert term.takes(x, None)
    assert not term.takes(x.double(), None)
    assert not term.takes(x[:7], None), "rows that the members do not divide would be read past the end"
    assert not term.takes(torch.nn.Parameter(x, requires_grad=False), None)
    for bias in (torch.ones(1), torch.ones(1, 12), torch.ones(16), torch.ones(12).double(), torch.ones(4, 24)[:, ::2]):
        assert not term.takes(x, bias)
    with torch.enable_grad():
        assert not term.takes(x, None)
    with forward_ad.dual_level():
        assert not term.takes(x, None)
    with FakeTensorMode():
        assert not term.takes(x, None)
    assert torch.vmap(lambda part: part + term.takes(part, None))(x.view(2, 4, 16)).equal(x.view(2, 4, 16))
    for parts in (
        (weight, a.contiguous(), b),  # the rank last in memory
        (weight, a, b[:2]),
        (weight.T, a, b),
        (weight, a.double(), b),
        (weight.half(), a.half(), b.half()),
        (weight[:, :0], a, b[:, :0]),
        (weight, torch.ones(4, 17, 12).mT, torch.ones(4, 17, 16).mT),
    ):
        assert low_rank_c.prepare(*parts) is None


@NEEDS_COMPILER
def test_layers_of_a_population_go_the_quick_way(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(16, 12, bias=False), torch.nn.Linear(12, 8)).bfloat16().eval()
    population = Population(model, population_size=4, sigma=0.1, rank=2)
    x, added = torch.randn(8, 16).bfloat16(), []
    with population.perturbed(0):
        model(x)  # learns
        real = low_rank_c.Term.add_
        monkeypatch.setattr(low_rank_c.Term, "add_", lambda *args: added.append(real(*args)))
        got = model(x)
        assert len(added) == 2
        monkeypatch.setattr(low_rank_c.Term, "takes", lambda *args: False)
        assert torch.equal(model(x), got)
        assert len(added) == 2
    with population.perturbed(1):
        assert not torch.equal(model(x), got)


def test_a_transpose_is_kept_and_prepared_once(monkeypatch):
    """``x @ W``, as in low-rank pairs, decodes with one look at the factors, and gives the bits of a fresh one."""

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(24, 8), requires_grad=False)

        def forward(self, x):
            return x @ self.w

    module, x = Pair(), torch.randn(6, 24)
    population = Population(module, population_size=6, sigma=0.1, kinds=("matrix",))
    prepared = []
    prepare = low_rank_c.prepare
    monkeypatch.setattr(low_rank_c, "prepare", lambda *parts: prepared.append(1) or prepare(*parts))
    with torch.no_grad(), population.perturbed(0):
        first, weight = module(x), module.w
        assert weight.transposed() is weight.transposed()
        before = len(prepared)
        assert torch.equal(module(x), first)
        assert len(prepared) == before
        weight._transposed = None
        assert torch.equal(module(x), first)
        weight.base.requires_grad_()
        kept, fresh = weight._transposed, weight.transposed()
        assert fresh is not kept
        weight.base.requires_grad_(False)


@pytest.mark.parametrize("kind", ["none", "shared", "own"])
def test_the_fused_kernel_is_called_as_it_wants_to_be(kind, monkeypatch):
    """What stands between a product on a GPU and the Triton kernel; the kernel itself is tested in the interpreter."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 3, 6).double(), torch.randn(5, 6).double()
    _, _, a, b = case(4, 1, 6, 5, 2, torch.float64)
    bias = {"none": None, "shared": torch.randn(5).double(), "own": torch.randn(4, 5).double()}[kind]
    expected = low_rank.linear(x, weight, a, b, bias)
    shapes = []

    def kernel(x_PBn, weight_mn, u_Prm, v_Prn, bias_m):
        shapes.append((x_PBn.shape, u_Prm.shape, v_Prn.shape))
        out = x_PBn @ weight_mn.T + x_PBn @ v_Prn.mT @ u_Prm
        return out if bias_m is None else out + bias_m

    monkeypatch.setattr(low_rank, "_fused_kernel", lambda *parts: kernel)
    torch.testing.assert_close(low_rank.linear(x, weight, a, b, bias), expected)
    assert shapes == [((4, 6, 6), (4, 2, 5), (4, 2, 6))]


def test_the_fused_kernel_is_used_only_where_it_is_asked_for(monkeypatch):
    x = torch.randn(2, 3)
    for setting in ("", "0", "1"):
        monkeypatch.setenv("EGGROLL_FUSED_LINEAR", setting)
        assert low_rank._fused_kernel(x, x) is None, "these are no tensors of a GPU"


@NEEDS_COMPILER
@torch.enable_grad()
def test_gradients_flow_where_they_are_asked_for(calls):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    a, b = torch.randn(2, 5, 1, requires_grad=True), torch.randn(2, 6, 1)
    low_rank.linear(x, weight, a, b).sum().backward()
    assert a.grad is not None
    low_rank.linear(x, weight.requires_grad_(), a.detach(), b).sum().backward()
    assert weight.grad is not None
    assert calls == [False, False]
    with torch.no_grad():
        low_rank.linear(x, weight, a, b)
    assert calls[-1]


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_perturbeds_and_traces_see_plain_operations(calls):
    torch.manual_seed(0)
    x, weight, a, b = torch.randn(3, 4, 6), torch.randn(5, 6), torch.randn(2, 5, 1), torch.randn(2, 6, 1)
    expected = torch.stack([low_rank.linear(part, weight, a, b) for part in x])
    assert all(calls)
    calls.clear()
    torch.testing.assert_close(torch.vmap(lambda part: low_rank.linear(part, weight, a, b))(x), expected)
    traced = torch.jit.trace(lambda part: low_rank.linear(part, weight, a, b), x[:1].reshape(4, 6), check_trace=False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], x[1])
        tangent = forward_ad.unpack_dual(low_rank.linear(dual, weight, a, b)).tangent
    first = x[0]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(part) for part in (first, weight, a, b)]
        assert low_rank.linear(*fake).shape == (4, 5)
    assert calls == [False] * 4
    torch.testing.assert_close(traced(x[2]), expected[2])
    torch.testing.assert_close(tangent, expected[1])
    compiled = torch.compile(lambda part: low_rank.linear(part, weight, a, b), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0]), expected[0])


def run_python(code, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_environment_variable_turns_it_off():
    code = """
        import torch
        from eggroll.torch import low_rank
        from eggroll.torch.kernels import low_rank_c, threefry_c
        x, w, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4, 1), torch.ones(2, 3, 1)
        assert torch.equal(low_rank.linear(x, w, a, b), torch.full((2, 4), 6.0))
        print(low_rank_c.why_not(), threefry_c.why_not(), sep=", ")
    """
    assert run_python(code, EGGROLL_NO_C="1") == "EGGROLL_NO_C is set, EGGROLL_NO_C is set"


def test_import_compiles_nothing():
    code = """
        from eggroll.torch import low_rank
        print(low_rank.low_rank_c._library.cache_info().currsize)
    """
    assert run_python(code) == "0"
