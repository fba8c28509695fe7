"""The forward pass as a Triton kernel: in the interpreter against the oracle, and compiled for a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from eggroll.pretrain.model import fixed_point

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# vocabulary, width, layers, rank (0: the model itself), kind of noise, members, extreme values
CASES = [
    (50, 24, 1, 0, "table", 3, False),
    (50, 24, 2, 2, "counter", 4, False),
    (256, 64, 2, 1, "table", 20, True),
    (100, 100, 1, 1, "table", 9, True),  # tiles that are cut off, a divisor that is no power of two
    (130, 16, 1, 2, "table", 140, False),  # two blocks of rows, three tiles of the vocabulary
]


def run_python(code, **environment):
    """Standard output of a new interpreter, as JSON; Triton decides on import whether it interprets."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_members_are_those_of_the_oracle():
    """Likelihoods, states and logits, through the engine, with a part of the members to each launch."""
    equal = run_python(
        f"""
        import json, numpy as np
        from eggroll.pretrain.engines import base, choose
        from eggroll.pretrain.model import oracle
        from eggroll.pretrain.model.noise import Noise
        from eggroll.pretrain.model.shape import ModelShape
        choose.use_triton = lambda device: True

        def same(vocab, hidden, layers, rank, kind, members, extreme):
            rng = np.random.default_rng(hidden)
            shape, noise = ModelShape(vocab, hidden, layers), Noise(3, max(rank, 1), kind, table_size=1 << 14)
            params = oracle.init_params(shape, 1)
            if extreme:
                params = {{n: rng.choice(np.array([-127, 0, 127], np.int8), v.shape) for n, v in params.items()}}
            made = choose.make_engine(params, noise, backend="torch", chunk=max(3, members - 8))
            made.fused = True  # what is compared is the kernel
            tokens = rng.integers(0, vocab, (2, 3)).astype(np.uint8)
            tokens[:, 1] = 0
            state = rng.integers(-127, 128, (2, layers, hidden)).astype(np.int8)
            window, asked = np.arange(members) % 2, ("fitness", "likelihood", "logits", "state")
            if rank:
                found = base.run_members(made, 5, np.arange(members), tokens, window, state, outputs=asked)
            else:
                found = base.run_center(made, tokens, state, outputs=asked)
            equal = True
            for i in {{0, 1, members // 2, members - 1}} if rank else (0, 1):
                draws = None
                if rank:
                    drawn = {{p.name: noise.draw(p, 5, [i // 2])[0] for p in shape.parameters}}
                    draws = oracle.member_draws(shape.parameters, rank, drawn, 1 - 2 * (i % 2))
                shift = oracle.noise_shift(max(rank, 1), 4)
                logits, after = oracle.forward(params, tokens[i % 2, :-1], state[i % 2], draws=draws, shift=shift)
                likelihood = oracle.log_likelihood(logits, tokens[i % 2, 1:])
                equal &= np.array_equal(logits, found.logits[i]) and np.array_equal(after, found.state[i])
                equal &= np.array_equal(likelihood, found.likelihood[i]) and found.fitness[i] == likelihood.sum()
            return bool(equal)

        print(json.dumps([same(*case) for case in {CASES!r}]))
        """,
        TRITON_INTERPRET="1",
    )
    assert equal == [True] * len(CASES)


def test_a_kernel_that_is_wrong_or_cannot_be_compiled_is_not_used():
    found = run_python(
        """
        import json, warnings, numpy as np
        from eggroll.pretrain.engines import base, choose, triton_kernel
        from eggroll.pretrain.model import oracle
        from eggroll.pretrain.model.noise import Noise
        from eggroll.pretrain.model.shape import ModelShape
        choose.use_triton = lambda device: True
        real, shape = triton_kernel.forward, ModelShape(50, 24, 1)
        params, tokens = oracle.init_params(shape, 1), np.array([[3, 0, 49, 7]], np.uint8)

        def wrong(*args, **options):
            likelihood, state, logits = real(*args, **options)
            return likelihood + 1, state, logits

        def broken(*args, **options):
            raise RuntimeError("no compiler")

        def run(forward, kept=True):
            triton_kernel.forward = forward
            made = choose.make_engine(params, Noise(table_size=1 << 14), backend="torch")
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                result = [base.run_members(made, 1, np.arange(4), tokens, np.zeros(4, int)) for _ in range(2)]
            assert (result[0].fitness == result[1].fitness).all()
            return result[0].fitness.tolist(), [str(w.message) for w in told if "Triton kernel" in str(w.message)]

        print(json.dumps([run(real), run(wrong), run(broken)]))
        """,
        TRITON_INTERPRET="1",
    )
    (fitness, no_words), (after_wrong, wrong), (after_broken, broken) = found
    assert fitness == after_wrong == after_broken
    assert no_words == []
    assert [len(wrong), len(broken)] == [1, 1]
    assert "other numbers than plain PyTorch on this device" in wrong[0]
    assert "cannot run here: RuntimeError('no compiler'); plain PyTorch is used" in broken[0]


def test_a_quotient_of_floats_is_that_of_integers():
    """Every numerator and size that a layer norm can have, in the kernel's operations and in float32."""
    numerators = np.arange(-(127**2), 127**2 + 1)
    for size in range(1, 128):
        inverse = np.float32(1) / np.float32(size)
        for error in (-1e-6, 0, 1e-6):  # a GPU's division is good to two units in the last place, 2e-7
            quotient = (numerators.astype(np.float32) + np.float32(0.5)) * (inverse * np.float32(1 + error))
            assert np.array_equal(np.floor(quotient).astype(np.int64), numerators // size)


def test_thresholds_fit_into_the_search():
    assert len(fixed_point.log2_thresholds()) <= 511


# vocabulary, width, layers, rank, members
COMPILED = [(256, 256, 6, 1, 4096), (50, 100, 1, 0, 3)]


@pytest.mark.parametrize(("capability", "own"), [(90, "wgmma.mma_async"), (100, "kind::i8")])
def test_every_variant_compiles_for_a_gpu(capability, own):
    found = run_python(
        f"""
        import json, types, torch
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver
        from eggroll.pretrain.engines import triton_kernel
        from eggroll.pretrain.engines.triton_kernel import Draws, Weights
        from eggroll.pretrain.model.shape import ModelShape

        # Everything that the launcher does but the launch: the kernel is made for a GPU that is not there.
        target = GPUTarget("cuda", {capability}, 32)
        driver.set_active(types.SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        ))
        kernel = triton_kernel.forward_kernel
        run, made = kernel.run, []
        kernel.run = lambda *args, **kw: made.append(run(*args, **(kw | dict(warmup=True))))

        def empty(*shape, dtype=torch.int8):
            return torch.zeros(shape, dtype=dtype)

        for vocab, hidden, layers, rank, members in {COMPILED!r}:
            shape = ModelShape(vocab, hidden, layers)
            weights = {{p.name: empty(*p.shape) for p in shape.parameters}}
            offsets = empty(len(shape.parameters), members, dtype=torch.int64)
            draws = Draws(empty(1 << 14), offsets, empty(members, dtype=torch.int32), rank, 8) if rank else None
            triton_kernel.forward(
                Weights.pack(weights, shape), shape, empty(members, 3, dtype=torch.int64),
                empty(members, layers, hidden), empty(members if rank else 1, 4 * layers + 1, hidden), draws,
            )
        words = ({own!r}, "s32.s8.s8", "kind::i8", "mma")
        print(json.dumps([[k.metadata.shared] + [k.asm["ptx"].count(word) for word in words] for k in made]))
        """
    )
    for case, (shared, asynchronous, int8, int8_tensor, mma) in zip(COMPILED, found, strict=True):
        assert shared <= 227 * 1024, case  # what a block of threads may have on sm_90
        assert mma > 0, case
        assert int8 + int8_tensor > 0, case
        if case[-1] > 64:
            assert asynchronous > 0, case  # the generation's own instruction
