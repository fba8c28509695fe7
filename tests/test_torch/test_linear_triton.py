"""The linear layer's Triton kernel: in the interpreter against float64 and plain operations, and compiled for a GPU."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DTYPES = ["float32", "bfloat16", "float16"]
FLOOR = 1e-6
"""Error in terms of the largest result that float32 sums may always have: each of at most 100 additions rounds by up to
6e-8 of a partial sum, so that their errors add up to some sqrt(100) x 6e-8 = 6e-7 of it."""

# members, rows of a member, outputs, inputs, rank, then what is special about the case
CASES = [
    (2, 1, 5, 7, 2, "bias"),
    (3, 1, 1, 1, 1, ""),
    (70, 1, 5, 9, 1, "bias"),  # more rows than a tile has
    (2, 5, 33, 40, 3, "expanded"),
    (3, 2, 4, 3, 40, "bias"),  # ranks in parts, and more than the matrix has
    (2, 15, 33, 40, 8, "bias strided"),
    (9, 16, 20, 33, 8, "bias"),
    (3, 17, 5, 70, 2, "bias expanded"),  # tiles that begin and end within a member
    (2, 64, 33, 40, 1, "strided"),
    (2, 64, 1, 40, 3, "bias"),
    (2, 64, 40, 1, 2, ""),
    (2, 17, 6, 5, 9, "bias"),
    (1, 20, 3, 4, 70, "bias"),
    (40, 16, 40, 5, 1, "bias"),  # more than one group of eight tiles of rows
    (2, 130, 35, 70, 8, "expanded"),
]


def name_of(case):
    members, batch, m, n, rank, special = case
    return f"{members}x{batch}x{n}-{m}-rank{rank}" + special.replace(" ", "-").join(["-", ""] if special else ["", ""])


def run_python(code, **environment):
    """Standard output of a new interpreter, as JSON; Triton decides on import whether it interprets."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# The interpreter holds bfloat16 as 16-bit integers, to which it truncates and which tl.dot multiplies as integers. Make
# it round to nearest and multiply the numbers, as a GPU does.
REPAIR_BFLOAT16 = """
    import numpy as np, torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_to_nearest(self, source, target):
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, target)

    def dot_of_numbers(self, a, b, *more):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *more)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_to_nearest, dot_of_numbers
"""

MEASURE = (
    REPAIR_BFLOAT16
    + """
    import json, sys
    from eggroll.torch.kernels.linear_triton import linear, linear_on_the_fly
    from eggroll.torch.threefry import normals

    def measure(dtype, members, batch, m, n, rank, special):
        generator = torch.Generator().manual_seed(members + batch + m + n + rank)
        def randn(*shape):
            return torch.randn(shape, generator=generator).to(dtype)
        x = randn(1 if "expanded" in special else members, batch, n).expand(members, batch, n)
        weight, bias = randn(m, n), randn(m) if "bias" in special else None
        if "strided" in special:
            x, weight = x.mT.contiguous().mT, weight.T.contiguous().T
        # One draw for two members, in an order of its own, and one draw that nobody has.
        draw = (torch.arange(members) // 2 + 1).flip(0)
        keys = np.random.default_rng(rank).integers(0, 2**32, (members // 2 + 2, 2), dtype=np.uint32)
        scale = torch.linspace(-1, 1, members) + 0.3
        factors = normals(keys, (n + m) * rank).view(-1, n + m, rank)[draw]
        u = (factors[:, n:] * scale[:, None, None]).to(dtype).mT
        v = factors[:, :n].to(dtype).mT

        perturbed = weight.double() + u.double().mT @ v.double()
        exact = x.double() @ perturbed.mT + (0 if bias is None else bias.double())
        plain = torch.nn.functional.linear(x, weight, bias) + (x @ v.mT) @ u
        stored = linear(x, weight, u, v, bias)
        drawn = linear_on_the_fly(x, weight, keys, draw, scale, rank, bias)
        largest = exact.abs().max()
        half_ulp = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2

        def error(result):
            assert (result.shape, result.dtype) == (exact.shape, dtype)
            return ((result.double() - exact).abs().max() / largest).item()

        def beyond_rounding(result):
            return (((result.double() - exact).abs() - half_ulp * exact.abs()).max() / largest).item()

        return dict(
            plain=error(plain), stored=error(stored), drawn=error(drawn),
            stored_beyond=beyond_rounding(stored), drawn_beyond=beyond_rounding(drawn),
            apart=((stored.double() - drawn.double()).abs().max() / largest).item(),
        )

    print(json.dumps([[measure(getattr(torch, dtype), *case) for case in CASES] for dtype in DTYPES]))
"""
)


@pytest.fixture(scope="module")
def measured():
    """Dtype -> case -> errors in terms of the largest exact result."""
    prelude = f"    CASES, DTYPES = {CASES!r}, {DTYPES!r}\n"
    found = run_python(prelude + MEASURE, TRITON_INTERPRET="1")
    return {dtype: dict(zip(CASES, of_dtype, strict=True)) for dtype, of_dtype in zip(DTYPES, found, strict=True)}


@pytest.mark.parametrize("factors", ["stored", "drawn"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_at_most_twice_those_of_plain_operations(measured, dtype, case, factors):
    errors = measured[dtype][case]
    assert errors[factors] <= 2 * errors["plain"] + FLOOR
    # More than that: beyond the one rounding of the result there is only what float32 sums have.
    assert errors[f"{factors}_beyond"] <= FLOOR


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_factors_are_the_stored_ones(measured, dtype, case):
    # The sums may be made in another order, after which a result can round the other way.
    assert measured[dtype][case]["apart"] <= 2 * FLOOR + (
        0 if dtype == "float32" else torch.finfo(getattr(torch, dtype)).eps
    )


def test_every_factor_is_drawn_bit_for_bit():
    """With a center of zeros, rank 1 and inputs of a single 1, a result is one product ``v[j] u[i]`` without a sum."""
    equal = run_python(
        REPAIR_BFLOAT16
        + """
    import json
    from eggroll.torch.kernels.linear_triton import linear_on_the_fly
    from eggroll.torch.threefry import normals
    m, n, members = 21, 18, 2
    keys, draw = np.array([[1, 2], [2**32 - 1, 3], [4, 2**31]], np.uint32), torch.tensor([2, 1], dtype=torch.int32)
    scale = torch.tensor([0.3, -0.7])
    factors = normals(keys, n + m)[draw]
    equal = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        u, v = (factors[:, n:] * scale[:, None]).to(dtype), factors[:, :n].to(dtype)
        for rows in (range(n), range(3, 8)):
            x, weight = torch.eye(n, dtype=dtype)[rows].expand(members, -1, -1), torch.zeros(m, n, dtype=dtype)
            for words in (keys, torch.from_numpy(keys), torch.from_numpy(keys.view(np.int32))):
                got = linear_on_the_fly(x, weight, words, draw, scale, 1)
                equal.append(torch.equal(got, v[:, rows, None] * u[:, None, :]))
    print(json.dumps(equal))
""",
        TRITON_INTERPRET="1",
    )
    assert equal == [True] * 18


def test_counters_beyond_32_bits(tmp_path):
    """No matrix is that large, so this draws the entries of one by themselves."""
    script = tmp_path / "entries.py"
    script.write_text(
        textwrap.dedent("""
            import numpy as np, torch, triton, triton.language as tl
            from eggroll.core import threefry
            from eggroll.torch.kernels.linear_triton import _entries

            @triton.jit
            def draw(keys, out, first, rank):
                k0, k1 = tl.load(keys).to(tl.uint32, bitcast=True), tl.load(keys + 1).to(tl.uint32, bitcast=True)
                i = tl.arange(0, 8)
                entries = _entries(None, 0, 0, 0, k0, k1, 0, i[None, :], i[:, None], first, rank, None)
                tl.store(out + 8 * i[:, None] + i[None, :], entries)

            first, rank, out = 2**31 - 20, 3000, torch.zeros(8, 8)
            draw[(1,)](torch.tensor([7, -9], dtype=torch.int32), out, first, rank)
            key = (7, 2**32 - 9)
            print([[threefry.normal(key, (8,), start=(first + i) * rank).tolist() for i in range(8)] == out.tolist()])
        """)
    )
    done = subprocess.run(
        [sys.executable, script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.stdout.strip() == "[True]", done.stderr


@pytest.mark.parametrize(("batch", "rank"), [(1, 1), (3, 2), (20, 3)])
def test_a_population_on_the_fly_is_that_of_the_oracle(batch, rank):
    error = run_python(
        f"""
        import json, numpy as np, torch
        from eggroll.core import oracle
        from eggroll.core.address import draw_keys, factor_draw, member_of
        from eggroll.core.select import ParameterSpec
        from eggroll.torch.kernels.linear_triton import linear, linear_on_the_fly
        batch, rank, members, m, n, sigma, seed, generation = {batch}, {rank}, 6, 11, 13, 0.2, 5, 9
        spec, rng = ParameterSpec("layer.weight", (m, n), "matrix"), np.random.default_rng(0)
        weight, x = rng.standard_normal((m, n), np.float32), rng.standard_normal((members, batch, n), np.float32)
        settings = dict(sigma=sigma, rank=rank, seed=seed, generation=generation)
        exact = np.stack([
            x[p].astype(float) @ oracle.member_params({{spec.name: weight}}, [spec], p, **settings)[spec.name].T
            for p in range(members)
        ])
        who = [member_of(p, antithetic=True) for p in range(members)]
        scale = torch.tensor([one.sign * sigma / rank**0.5 for one in who])
        keys = draw_keys(seed, spec.name, generation, range(members // 2))
        x, weight = torch.from_numpy(x), torch.from_numpy(weight)
        drawn = linear_on_the_fly(x, weight, keys, torch.tensor([one.pair for one in who]), scale, rank)
        a, b = (np.stack(f) for f in zip(*(factor_draw(spec, rank, seed, generation, one.pair) for one in who)))
        stored = linear(x, weight, torch.from_numpy(a).mT * scale[:, None, None], torch.from_numpy(b).mT)
        print(json.dumps([float(abs(y.numpy() - exact).max() / abs(exact).max()) for y in (drawn, stored)]))
        """,
        TRITON_INTERPRET="1",
    )
    assert max(error) <= FLOOR


COMPILE = """
    import json, types, numpy as np, torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from eggroll.torch.kernels import linear_triton

    # Everything that the launchers do but the launch: the kernel is made for a GPU that is not there.
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(types.SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    ))
    run, made = linear_triton.linear_kernel.run, []
    linear_triton.linear_kernel.run = lambda *args, **kw: made.append(run(*args, **(kw | dict(warmup=True))))

    def compiled(dtype, members, batch, m, n, rank, factors, tf32):
        dtype = getattr(torch, dtype)
        x, weight, bias = torch.empty(n, dtype=dtype).expand(members, batch, n), *(
            torch.empty(shape, dtype=dtype) for shape in ((m, n), (m,))
        )
        if factors == "stored":
            both = torch.empty(members, n + m, rank, dtype=dtype)
            linear_triton.linear(x, weight, both[:, n:].mT, both[:, :n].mT, bias, tf32=tf32)
        else:
            who, scale = torch.empty(members, dtype=torch.int64), torch.empty(members)
            linear_triton.linear_on_the_fly(x, weight, np.zeros((1, 2), np.uint32), who, scale, rank, bias, tf32=tf32)
        ptx = made[-1].asm["ptx"]
        words = ("mma", "wgmma.mma_async", "bf16.bf16", "tf32.tf32", "cp.async", "fma.rn.f32", "approx", "div.full")
        return {word: ptx.count(word) for word in words} | {"shared": made[-1].metadata.shared}

    print(json.dumps([compiled(*case) for case in CASES]))
"""
TILE, GATHER, LONG, ONES = (256, 64, 256, 256), (2048, 1, 256, 256), (64, 64, 4096, 4096), (1, 1, 1, 1)
COMPILED = [
    *((dtype, *shape, 1, factors, False) for factors in ("stored", "drawn")
      for dtype in ("bfloat16", "float32") for shape in (TILE, GATHER)),
    ("bfloat16", *LONG, 8, "drawn", False),
    *(("bfloat16", *ONES, 1, factors, False) for factors in ("stored", "drawn")),
    ("float16", *TILE, 1, "stored", False),
    ("float32", *TILE, 1, "stored", True),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    found = run_python(f"    CASES = {COMPILED!r}\n" + COMPILE)
    return dict(zip(COMPILED, found, strict=True))


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_every_variant_compiles_for_a_gpu(compiled, case):
    ptx, (dtype, *shape, _, factors, tf32) = compiled[case], case
    assert ptx["shared"] <= 227 * 1024  # what a block of threads may have on sm_90
    assert (ptx["mma"] > 0) == (dtype != "float32" or tf32)  # float32 keeps its precision unless asked
    if tuple(shape) in (TILE, LONG) and (dtype != "float32" or tf32):
        assert ptx["wgmma.mma_async"] > 0
        assert ptx["tf32.tf32" if tf32 else "bf16.bf16"] > 0 or dtype == "float16"
    if tuple(shape) != ONES:
        assert ptx["cp.async"] > 0  # loads run ahead of the products
    if factors == "drawn":
        # In products of float32 operations are fused, as many as with stored factors, but in normals none.
        assert (ptx["approx"], ptx["div.full"]) == (0, 0)
        if dtype == "bfloat16":
            assert ptx["fma.rn.f32"] == 0
        elif tuple(shape) == TILE:
            assert ptx["fma.rn.f32"] == compiled[(dtype, *shape, 1, "stored", tf32)]["fma.rn.f32"]


def test_empty_results_launch_nothing():
    from eggroll.torch.kernels.linear_triton import linear

    for members, batch, m in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        factors = torch.zeros(members, 1, m), torch.zeros(members, 1, 5)
        assert linear(torch.zeros(members, batch, 5), torch.zeros(m, 5), *factors).shape == (members, batch, m)


def test_bad_arguments():
    from eggroll.torch.kernels import linear_triton

    x, weight, u, v = torch.zeros(2, 3, 5), torch.zeros(4, 5), torch.zeros(2, 1, 4), torch.zeros(2, 1, 5)
    linear = functools.partial(linear_triton.linear, x)
    with pytest.raises(
        ValueError, match=r"x_PBn must be \(members, rows, n\) of float32, .*; got torch.float32 \(3, 5\)"
    ):
        linear_triton.linear(x[0], weight, u, v)
    with pytest.raises(
        ValueError, match=r"x_PBn must be .* at most 2\*\*31 - 128 rows in all; got .* \(2, 2147483648, 5\)"
    ):
        linear_triton.linear(torch.zeros(5).expand(2, 2**31, 5), weight, u, v)
    with pytest.raises(ValueError, match=r"x_PBn must be .*; got torch.float64"):
        linear_triton.linear(x.double(), weight.double(), u.double(), v.double())
    with pytest.raises(
        ValueError, match=r"weight_mn must be torch.float32 \(5, 5\) on cpu; got torch.float32 \(5, 4\)"
    ):
        linear(weight.T, u, v)
    with pytest.raises(
        ValueError, match=r"u_Prm must be torch.float32 \(2, 1, 4\) on cpu; got torch.bfloat16 \(2, 1, 4\)"
    ):
        linear(weight, u.bfloat16(), v)
    with pytest.raises(
        ValueError, match=r"v_Prn must be torch.float32 \(2, 1, 5\) on cpu; got torch.float32 \(1, 1, 5\)"
    ):
        linear(weight, u, v[:1])
    with pytest.raises(ValueError, match=r"rank \(=0\) must be at least 1, and stored factors \(members, rank, size\)"):
        linear(weight, u[0], v)
    with pytest.raises(ValueError, match=r"bias_m must be torch.float32 \(4,\) on cpu; got torch.float32 \(5,\)"):
        linear(weight, u, v, x[0, 0])

    keys, who, scale = np.zeros((1, 2), np.uint32), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    drawn = functools.partial(linear_triton.linear_on_the_fly, x, weight)
    with pytest.raises(ValueError, match=r"keys_K2 must be \(K, 2\) of uint32 or int32; got torch.int64 \(1, 2\)"):
        drawn(keys.astype(np.int64), who, scale, 1)
    with pytest.raises(ValueError, match=r"keys_K2 must be .*; got torch.uint32 \(2,\)"):
        drawn(keys[0], who, scale, 1)
    with pytest.raises(ValueError, match=r"draw_of_member_P must be torch.int32 \(2,\) on cpu; got torch.float32"):
        drawn(keys, scale, scale, 1)
    with pytest.raises(ValueError, match=r"scale_P must be torch.float32 \(2,\) on cpu; got torch.float64 \(2,\)"):
        drawn(keys, who, scale.double(), 1)
    with pytest.raises(ValueError, match=r"rank \(=0\) must be at least 1"):
        drawn(keys, who, scale, 0)
