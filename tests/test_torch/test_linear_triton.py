"""The linear layer's Triton kernel: in the interpreter against float64 and plain operations, and compiled for a GPU."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import textwrap

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
    from eggroll.torch.kernels.linear_triton import linear

    def measure(dtype, members, batch, m, n, rank, special):
        generator = torch.Generator().manual_seed(members + batch + m + n + rank)
        def randn(*shape):
            return torch.randn(shape, generator=generator).to(dtype)
        x = randn(1 if "expanded" in special else members, batch, n).expand(members, batch, n)
        weight, bias = randn(m, n), randn(m) if "bias" in special else None
        if "strided" in special:
            x, weight = x.mT.contiguous().mT, weight.T.contiguous().T
        factors = torch.randn((members, n + m, rank), generator=generator)
        scale = torch.linspace(-1, 1, members) + 0.3
        u = (factors[:, n:] * scale[:, None, None]).to(dtype).mT
        v = factors[:, :n].to(dtype).mT

        perturbed = weight.double() + u.double().mT @ v.double()
        exact = x.double() @ perturbed.mT + (0 if bias is None else bias.double())
        plain = torch.nn.functional.linear(x, weight, bias) + (x @ v.mT) @ u
        fused = linear(x, weight, u, v, bias)
        largest = exact.abs().max()
        half_ulp = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2

        def error(result):
            assert (result.shape, result.dtype) == (exact.shape, dtype)
            return ((result.double() - exact).abs().max() / largest).item()

        def beyond_rounding(result):
            return (((result.double() - exact).abs() - half_ulp * exact.abs()).max() / largest).item()

        return dict(
            plain=error(plain), fused=error(fused), beyond_rounding=beyond_rounding(fused)
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


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_at_most_twice_those_of_plain_operations(measured, dtype, case):
    errors = measured[dtype][case]
    assert errors["fused"] <= 2 * errors["plain"] + FLOOR
    # More than that: beyond the one rounding of the result there is only what float32 sums have.
    assert errors["beyond_rounding"] <= FLOOR


@pytest.mark.parametrize(("batch", "rank"), [(1, 1), (3, 2), (20, 3)])
def test_a_population_is_that_of_the_oracle(batch, rank):
    error = run_python(
        f"""
        import json, numpy as np, torch
        from eggroll.core import oracle
        from eggroll.core.address import factor_draw, member_of
        from eggroll.core.select import ParameterSpec
        from eggroll.torch.kernels.linear_triton import linear
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
        x, weight = torch.from_numpy(x), torch.from_numpy(weight)
        a, b = (np.stack(f) for f in zip(*(factor_draw(spec, rank, seed, generation, one.pair) for one in who)))
        y = linear(x, weight, torch.from_numpy(a).mT * scale[:, None, None], torch.from_numpy(b).mT)
        print(json.dumps(float(abs(y.numpy() - exact).max() / abs(exact).max())))
        """,
        TRITON_INTERPRET="1",
    )
    assert error <= FLOOR


COMPILE = """
    import json, types, numpy as np, torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from eggroll.torch.kernels import linear_triton

    # Everything that the launchers do but the launch: the kernel is made for a GPU that is not there.
    target = GPUTarget("cuda", CAPABILITY, 32)
    driver.set_active(types.SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    ))
    run, made = linear_triton.linear_kernel.run, []
    linear_triton.linear_kernel.run = lambda *args, **kw: made.append(run(*args, **(kw | dict(warmup=True))))

    def compiled(dtype, members, batch, m, n, rank, tf32):
        dtype = getattr(torch, dtype)
        x, weight, bias = torch.empty(n, dtype=dtype).expand(members, batch, n), *(
            torch.empty(shape, dtype=dtype) for shape in ((m, n), (m,))
        )
        both = torch.empty(members, n + m, rank, dtype=dtype)
        linear_triton.linear(x, weight, both[:, n:].mT, both[:, :n].mT, bias, tf32=tf32)
        ptx = made[-1].asm["ptx"]
        words = ("mma", "wgmma.mma_async", "tcgen05.mma", "bf16.bf16", "tf32.tf32", "cp.async")
        return {word: ptx.count(word) for word in words} | {"shared": made[-1].metadata.shared}

    print(json.dumps([compiled(*case) for case in CASES]))
"""
TILE, GATHER, LONG, ONES = (256, 64, 256, 256), (2048, 1, 256, 256), (64, 64, 4096, 4096), (1, 1, 1, 1)
COMPILED = [
    *((dtype, *shape, 1, False) for dtype in ("bfloat16", "float32") for shape in (TILE, GATHER)),
    ("bfloat16", *LONG, 8, False),
    ("bfloat16", *ONES, 1, False),
    ("float16", *TILE, 1, False),
    ("float32", *TILE, 1, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    found = run_python(f"    CASES, CAPABILITY = {COMPILED!r}, 90\n" + COMPILE)
    return dict(zip(COMPILED, found, strict=True))


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_every_variant_compiles_for_a_gpu(compiled, case):
    ptx, (dtype, *shape, _, tf32) = compiled[case], case
    assert ptx["shared"] <= 227 * 1024  # what a block of threads may have on sm_90
    assert (ptx["mma"] > 0) == (dtype != "float32" or tf32)  # float32 keeps its precision unless asked
    if tuple(shape) in (TILE, LONG) and (dtype != "float32" or tf32):
        assert ptx["wgmma.mma_async"] > 0
        assert ptx["tf32.tf32" if tf32 else "bf16.bf16"] > 0 or dtype == "float16"
    if tuple(shape) != ONES:
        assert ptx["cp.async"] > 0  # loads run ahead of the products


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
    with pytest.raises(ValueError, match=r"rank \(=0\) must be at least 1, and factors \(members, rank, size\)"):
        linear(weight, u[0], v)
    with pytest.raises(ValueError, match=r"bias_m must be torch.float32 \(4,\) on cpu; got torch.float32 \(5,\)"):
        linear(weight, u, v, x[0, 0])


def test_it_compiles_for_the_next_generation_of_gpus():
    [found] = run_python(f"    CASES, CAPABILITY = {[('bfloat16', *TILE, 8, False)]!r}, 100\n" + COMPILE)
    assert found["shared"] <= 227 * 1024
    assert found["tcgen05.mma"] > 0  # Blackwell's own instruction, where Hopper has wgmma
    assert found["wgmma.mma_async"] == 0
