"""The product's Triton kernel: in the interpreter against the oracle, and compiled for a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# rows, outputs, inputs, rank, extreme values
CASES = [
    (1, 1, 1, 0, False),
    (5, 7, 3, 1, False),
    (20, 33, 64, 2, True),
    (140, 64, 100, 1, False),  # two tiles of rows, a divisor that is no power of two
    (17, 130, 256, 0, True),
    (3, 16, 1024, 1, True),
]


def run_python(code, **environment):
    """Standard output of a new interpreter, as JSON; Triton decides on import whether it interprets."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_are_those_of_the_oracle():
    equal = run_python(
        f"""
        import json, numpy as np, torch
        from eggroll.pretrain import oracle
        from eggroll.pretrain.fixed_point import divisor
        from eggroll.pretrain.product_triton import product

        def same(rows, m, n, rank, extreme):
            rng = np.random.default_rng(rows)
            def draw(*shape):
                if extreme:
                    return rng.choice(np.array([-127, 0, 127], np.int8), shape)
                return rng.integers(-127, 128, shape).astype(np.int8)
            x, w, a, b = draw(rows, n), draw(m, n), draw(rows, max(rank, 1), m) // 2, draw(rows, max(rank, 1), n) // 2
            factors = [(a[i], b[i]) if rank else None for i in range(rows)]
            exact = np.stack([oracle.product(x[i], w, factors[i], 8) for i in range(rows)])
            given = (torch.from_numpy(f) if rank else None for f in (a, b))
            got = product(torch.from_numpy(x), torch.from_numpy(w), divisor(n), *given, 8)
            return bool(np.array_equal(got.numpy(), exact))

        print(json.dumps([same(*case) for case in {CASES!r}]))
        """,
        TRITON_INTERPRET="1",
    )
    assert equal == [True] * len(CASES)


def test_a_whole_model_in_the_interpreter():
    equal = run_python(
        """
        import json, numpy as np
        from eggroll.pretrain import engine, engine_torch, oracle
        from eggroll.pretrain.noise import Noise
        from eggroll.pretrain.shape import ModelShape
        engine_torch.use_triton = lambda device: True
        shape, noise = ModelShape(50, 24, 1), Noise(3, 2, table_size=1 << 14)
        params, tokens = oracle.init_params(shape, 1), np.array([[3, 0, 49, 7]], np.uint8)
        made = [engine.make_engine(params, noise, backend="torch")]
        result = engine.run_members(made[0], 1, np.arange(4), tokens, np.zeros(4, int), outputs=("logits",))
        equal = []
        for i in range(4):
            drawn = {p.name: noise.draw(p, 1, [i // 2])[0] for p in shape.parameters}
            draws = oracle.member_draws(shape.parameters, 2, drawn, 1 - 2 * (i % 2))
            logits, _ = oracle.forward(params, tokens[0, :-1], draws=draws, shift=oracle.noise_shift(2, 4))
            equal.append(bool(np.array_equal(logits, result.logits[i])))
        print(json.dumps(equal))
        """,
        TRITON_INTERPRET="1",
    )
    assert equal == [True] * 4


COMPILED = [
    (4096, 256, 256, 1, False),
    (4096, 1024, 256, 0, False),
    (4096, 256, 1024, 2, False),
    (3, 64, 100, 1, False),
]


def test_every_variant_compiles_for_a_gpu():
    found = run_python(
        f"""
        import json, types, torch
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver
        from eggroll.pretrain import product_triton
        from eggroll.pretrain.fixed_point import divisor

        # Everything that the launcher does but the launch: the kernel is made for a GPU that is not there.
        target = GPUTarget("cuda", 90, 32)
        driver.set_active(types.SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        ))
        run, made = product_triton.product_kernel.run, []
        product_triton.product_kernel.run = lambda *args, **kw: made.append(run(*args, **(kw | dict(warmup=True))))
        for rows, m, n, rank, _ in {COMPILED!r}:
            empty = lambda *shape: torch.empty(shape, dtype=torch.int8)
            factors = (empty(rows, rank, m), empty(rows, rank, n)) if rank else (None, None)
            product_triton.product(empty(rows, n), empty(m, n), divisor(n), *factors, 8)
        words = ("wgmma.mma_async", "s32.s8.s8", "mma")
        print(json.dumps([[k.metadata.shared] + [k.asm["ptx"].count(word) for word in words] for k in made]))
        """
    )
    for case, (shared, asynchronous, int8, mma) in zip(COMPILED, found, strict=True):
        assert shared <= 227 * 1024, case  # what a block of threads may have on sm_90
        assert mma > 0, case
        if case[0] > 64:
            assert asynchronous > 0, case  # Hopper's own instruction
            assert int8 > 0, case
