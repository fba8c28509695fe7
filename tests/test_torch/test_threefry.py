"""The noise of every version (eager, C, Triton) against the NumPy reference, JAX and one another."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll.core import normal
from eggroll.core import threefry as core
from eggroll.errors import ConfigError
from eggroll.torch import threefry
from eggroll.torch.kernels import threefry_c, threefry_eager

NOISE_SPEC = Path(__file__).parents[2] / "docs" / "noise-spec.md"
STARTS = [0, 1, 2**32 - 3, 2**40 + 5, 2**63 - 9, 2**64 - 700]
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
NEEDS_COMPILER = pytest.mark.skipif(bool(threefry_c.why_not()), reason=str(threefry_c.why_not()))


@pytest.fixture(params=["eager", pytest.param("c", marks=NEEDS_COMPILER)])
def version(request, monkeypatch):
    """Each version for the CPU in turn."""
    monkeypatch.setenv("EGGROLL_COMPILE_NOISE", "1" if request.param == "c" else "0")
    return threefry_c if request.param == "c" else threefry_eager


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def some_keys(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (count, 2), dtype=np.uint32)


def ulps(result, reference):
    """Distance in units in the last place of float32."""

    def ordinal(values):
        bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return np.abs(ordinal(result) - ordinal(reference))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("num_keys", "count"), [(1, 700), (3, 257), (60, 7), (2, 1), (50, 48)])
def test_bits_are_those_of_the_reference(version, num_keys, count, start):
    keys = some_keys(num_keys)
    bits = threefry.random_bits(keys, count, start=start)
    assert bits.dtype == torch.int32
    assert bits.shape == (num_keys, count)
    expected = np.stack([core.random_bits((int(a), int(b)), count, start=start) for a, b in keys])
    np.testing.assert_array_equal(bits.numpy().view(np.uint32), expected)


@pytest.mark.parametrize("start", STARTS)
def test_normals_are_those_of_the_reference(version, start):
    keys = some_keys(4)
    got = threefry.normals(keys, 700, start=start).numpy()
    expected = np.stack([core.normal((int(a), int(b)), (700,), start=start) for a, b in keys])
    np.testing.assert_array_equal(got, expected)


def normals_of(bits):
    """The eager version's normals of given words (int32), which draws would only meet by chance."""
    work, found = threefry_eager._Workspace(torch.empty(1, bits.numel())), []
    for part in bits.flatten().split(work.block):
        torch.bitwise_xor(part, -(1 << 31), out=work.a[: len(part)])
        found.append(work.normals(len(part)).clone())
    return torch.cat(found).view(bits.shape)


def test_every_normal_there_is():
    """A normal depends on 23 bits: all 2**23 of them, against the reference and against JAX."""
    bits = np.arange(2**23, dtype=np.uint32) << np.uint32(9)
    got = normals_of(torch.from_numpy(bits.view(np.int32))).numpy()
    reference = normal.bits_to_normal(bits)
    np.testing.assert_array_equal(got, reference)

    jax = pytest.importorskip("jax")
    uniform = ((bits >> np.uint32(9)).astype(np.float64) * 2.0**-22 - 1 + 2.0**-24).astype(np.float32)
    of_jax = np.asarray(jax.numpy.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform))
    assert ulps(got, of_jax).max() <= 3


def test_draws_are_those_of_jax(version):
    jax = pytest.importorskip("jax")
    for seed in (0, 42, 2**31 - 1):
        key = jax.random.key(seed)
        words = np.asarray(jax.random.key_data(key))[None]
        bits = threefry.random_bits(words, 5000)[0].numpy().view(np.uint32)
        np.testing.assert_array_equal(bits, np.asarray(jax.random.bits(key, (5000,))))
        normals = threefry.normals(words, 5000)[0].numpy()
        assert ulps(normals, np.asarray(jax.random.normal(key, (5000,)))).max() <= 3


@pytest.mark.parametrize("start", [2**32 - 5, 2**32, 2**45 + 1])
def test_counters_beyond_32_bits_are_those_of_jax(version, start):
    """A draw of JAX that is long enough would not fit into memory, so this calls its cipher on the counters."""
    random = pytest.importorskip("jax.extend.random")
    key, counters = np.array([7, 0xDEADBEEF], np.uint32), start + np.arange(64, dtype=np.uint64)
    hi, lo = (counters >> np.uint64(32)).astype(np.uint32), counters.astype(np.uint32)
    x0, x1 = np.asarray(random.threefry_2x32(key, np.concatenate([hi, lo]))).reshape(2, -1)
    bits = threefry.random_bits(key[None], 64, start=start)[0].numpy().view(np.uint32)
    np.testing.assert_array_equal(bits, x0 ^ x1)


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_keys", "count", "start"), [(1, 2**21, 3), (40, 1152, 0), (70, 5, 2**32 - 2)])
def test_both_versions_give_the_same_floats(monkeypatch, num_keys, count, start, dtype):
    keys, draws = some_keys(num_keys, seed=1), []
    for setting in "01":
        monkeypatch.setenv("EGGROLL_COMPILE_NOISE", setting)
        draws.append(threefry.normals(keys, count, start=start, dtype=dtype))
    assert draws[0].dtype == dtype
    assert torch.equal(draws[0], draws[1])
    exact = threefry.normals(keys, count, start=start)
    assert torch.equal(draws[0], exact.to(dtype))


def test_the_version_for_other_devices_gives_the_same_floats(monkeypatch):
    bits = torch.from_numpy(some_keys(2**16).view(np.int32))
    sparse = normals_of(bits)
    workspace = threefry_eager._Workspace
    monkeypatch.setattr(workspace, "_finish_sparsely", workspace._finish_densely)
    assert torch.equal(normals_of(bits), sparse)


def test_results_do_not_depend_on_blocks_or_threads(version, monkeypatch, two_threads):
    keys = some_keys(3)
    expected, bits = threefry.normals(keys, 5000, start=2**32 - 1000), threefry.random_bits(keys, 5000)
    for threads, block in [(1, 64), (2, 64), (2, 1000), (2, 2500), (1, 7000)]:
        torch.set_num_threads(threads)
        monkeypatch.setattr(threefry_eager, "BLOCK_PER_THREAD", block)
        monkeypatch.setattr(threefry_c, "MIN_PER_THREAD", block)
        monkeypatch.setattr(threefry_c, "CAST_BLOCK", block)
        assert torch.equal(threefry.normals(keys, 5000, start=2**32 - 1000), expected)
        assert torch.equal(threefry.random_bits(keys, 5000), bits)
        half = threefry.normals(keys, 5000, start=2**32 - 1000, dtype=torch.bfloat16)
        assert torch.equal(half, expected.to(torch.bfloat16))


@settings(max_examples=40)
@given(
    num_keys=st.integers(1, 60), count=st.integers(1, 200), start=st.integers(0, 2**64 - 200), cut=st.integers(0, 200)
)
@pytest.mark.parametrize("setting", ["0", pytest.param("1", marks=NEEDS_COMPILER)])
def test_any_part_of_a_draw_equals_that_part_of_the_whole(setting, num_keys, count, start, cut):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("EGGROLL_COMPILE_NOISE", setting)
        keys = some_keys(num_keys)
        whole = threefry.normals(keys, count, start=start)
        cut, row = min(cut, count), num_keys // 2
        parts = threefry.normals(keys, cut, start=start), threefry.normals(keys, count - cut, start=start + cut)
        assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.equal(threefry.normals(keys[row : row + 1], count, start=start)[0], whole[row])


def test_keys_may_be_tensors(version):
    keys = some_keys(4)
    expected = threefry.normals(keys, 20)
    for dtype in (torch.int64, torch.uint32):
        assert torch.equal(threefry.normals(torch.from_numpy(keys.astype(np.int64)).to(dtype), 20), expected)
    assert torch.equal(threefry.normals(keys[:, ::-1][:, ::-1], 20), expected)


def test_nothing_drawn_is_an_empty_tensor(version):
    assert threefry.normals(some_keys(3), 0).shape == (3, 0)
    assert threefry.random_bits(np.empty((0, 2), np.uint32), 4).shape == (0, 4)


def test_moments_and_independence_of_keys(version):
    draws = threefry.normals(some_keys(4, seed=5), 200_000).double()
    assert draws.mean(1).abs().max() < 0.01
    assert (draws.var(1) - 1).abs().max() < 0.015
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.01


def test_bad_arguments():
    keys = some_keys(2)
    with pytest.raises(ValueError, match=r"keys must be whole numbers of shape \(K, 2\).*got uint32 \(2,\)"):
        threefry.normals(keys[0], 3)
    with pytest.raises(ValueError, match=r"two 32-bit words per key; got float32 \(2, 2\)"):
        threefry.random_bits(keys.astype(np.float32), 3)
    with pytest.raises(ValueError, match=r"count \(=-1\) and start \(=0\) must not be negative"):
        threefry.normals(keys, -1)
    with pytest.raises(ValueError, match=r"start \(=18446744073709551615\).*start \+ count at most 2\*\*64"):
        threefry.normals(keys, 2, start=2**64 - 1)
    with pytest.raises(ValueError, match=r"dtype \(=torch.int32\) must be a floating dtype"):
        threefry.normals(keys, 2, dtype=torch.int32)


def test_the_environment_variable_is_checked(monkeypatch):
    monkeypatch.setenv("EGGROLL_COMPILE_NOISE", "yes")
    with pytest.raises(ConfigError, match=r"EGGROLL_COMPILE_NOISE \(='yes'\) must be 0 .*, 1 .* or unset"):
        threefry.normals(some_keys(1), 3)


def test_without_a_compiler_plain_operations_draw_the_same(monkeypatch):
    expected = threefry.normals(some_keys(2), 300)
    monkeypatch.setattr(threefry_c, "why_not", lambda: "no C compiler found")
    monkeypatch.delenv("EGGROLL_COMPILE_NOISE", raising=False)
    assert torch.equal(threefry.normals(some_keys(2), 300), expected)
    monkeypatch.setenv("EGGROLL_COMPILE_NOISE", "1")
    with pytest.raises(ConfigError, match=r"EGGROLL_COMPILE_NOISE=1, but no C compiler found. Install a C compiler"):
        threefry.normals(some_keys(2), 300)


FAST = "-fassociative-math -fno-signed-zeros -fno-trapping-math -freciprocal-math -ffp-contract=fast -march=native"


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no-such-compiler could not make the library: .*No such file"),
        (f"{sys.executable} -c 1/0", "could not make the library: .*ZeroDivisionError"),
        # Not -ffast-math itself: a library linked with it makes the whole process flush subnormals from then on.
        pytest.param(f"cc {FAST}", "the library made by cc .* rounds differently", marks=NEEDS_COMPILER),
    ],
)
def test_a_compiler_that_does_not_do_is_not_used(monkeypatch, compiler, reason):
    monkeypatch.setenv("CC", compiler)
    assert re.search(reason, threefry_c._library.__wrapped__(), re.DOTALL)


def test_no_compiler_at_all(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert threefry_c._library.__wrapped__() == "no C compiler found (looked for $CC, cc, gcc, clang)"


def test_test_vectors_of_the_specification(version):
    blocks = re.findall(r"```json\n(.*?)```", NOISE_SPEC.read_text(encoding="utf-8"), re.DOTALL)
    vectors = [vector for block in blocks for vector in json.loads(block)]
    assert len(vectors) >= 6
    for vector in vectors:
        key, start = np.array([[int(word, 16) for word in vector["key"]]], np.uint32), int(vector["start"])
        bits = threefry.random_bits(key, len(vector["bits"]), start=start)[0].numpy().view(np.uint32)
        assert [f"{word:08x}" for word in bits] == vector["bits"]
        normals = threefry.normals(key, len(vector["normals"]), start=start)[0].tolist()
        assert normals == [float.fromhex(value) for value in vector["normals"]]


def run_python(code, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_compiles_and_loads_nothing():
    printed = run_python("""
        import sys
        import eggroll.torch.threefry
        from eggroll.torch.kernels import threefry_c
        print("eggroll.torch.kernels.threefry_triton" in sys.modules, threefry_c._library.cache_info().currsize)
    """)
    assert printed == ["False", "0"]


@NEEDS_TRITON
def test_the_triton_kernel_gives_the_same_floats_in_the_interpreter():
    printed = run_python(
        """
        import numpy as np, torch
        from eggroll.torch.kernels import threefry_eager, threefry_triton
        keys = np.random.default_rng(0).integers(0, 2**32, (5, 2), dtype=np.uint32)
        for num_keys, count, start in [(1, 20000, 0), (5, 77, 2**32 - 30), (3, 1152, 2**40), (1, 5, 2**64 - 5)]:
            for dtype in (torch.float32, torch.float16, torch.int32):
                fill = "fill_bits" if dtype == torch.int32 else "fill_normals"
                expected, got = (torch.zeros(num_keys, count, dtype=dtype) for _ in range(2))
                getattr(threefry_eager, fill)(expected, keys[:num_keys], start)
                getattr(threefry_triton, fill)(got, keys[:num_keys], start)
                print(torch.equal(got, expected))
        """,
        TRITON_INTERPRET="1",
    )
    assert printed == ["True"] * 12


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("out", "start", "capability"),
    [("*fp32", "i32", 90), ("*bf16", "i64", 90), ("*i32", "u64", 90), ("*fp32", "i32", 100)],
)
def test_the_triton_kernel_compiles_for_a_gpu_without_fused_operations(out, start, capability):
    printed = run_python(f"""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from eggroll.torch.kernels.threefry_triton import threefry_kernel
        types = dict(keys="*i32", out="{out}", start="{start}", count="i32", blocks_per_row="i32")
        constants = dict(BLOCK=1024, NORMAL={out != "*i32"})
        source = ASTSource(
            threefry_kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants
        )
        target = GPUTarget("cuda", {capability}, 32)
        kernel = triton.compile(source, target=target, options=dict(enable_fp_fusion=False))
        assembly = kernel.asm["ptx"]
        print(len(kernel.asm["cubin"]) > 0, "fma" in assembly, "approx" in assembly, "div.full" in assembly)
        print("cvt.rn.bf16" in assembly)
    """)
    assert printed == ["True", "False", "False", "False", str(out == "*bf16")]
