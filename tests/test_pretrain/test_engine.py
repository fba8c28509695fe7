"""Every engine equals the oracle, bit for bit: widths, depths, ranks, chunks, threads, extremes."""

import ctypes
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll.errors import ConfigError, DataError
from eggroll.pretrain import update
from eggroll.pretrain.engines import base, choose, library
from eggroll.pretrain.engines import c as engine_c
from eggroll.pretrain.model import fixed_point, oracle
from eggroll.pretrain.model.noise import Noise
from eggroll.pretrain.model.shape import ModelShape
from eggroll.torch.kernels import compile_c

WITHOUT_VNNI = ("-mno-avx512vnni",)
"""Compiles what CPUs with AVX2 run, on CPUs with more too."""
ALL = ("fitness", "likelihood", "logits", "state")
BACKENDS = ["torch"] + ([] if isinstance(library.load(), str) else ["c"])
# V, D, L: powers of four and others, below and above the kernel's 64 columns, one that is no multiple of 4
SHAPES = [(256, 64, 1), (256, 16, 3), (50, 24, 2), (17, 100, 1), (2, 3, 2), (256, 256, 1), (65, 1, 1)]


def random_params(shape, seed, *, extreme=False):
    """Parameters of a shape: any int8 from -127 to 127, or only the ends and 0."""
    rng = np.random.default_rng(seed)
    if extreme:
        return {p.name: rng.choice(np.array([-127, 0, 127], np.int8), p.shape) for p in shape.parameters}
    return {p.name: rng.integers(-127, 128, p.shape).astype(np.int8) for p in shape.parameters}


def some_windows(shape, count, steps, seed):
    """``(count, steps + 1)`` tokens, with the beginning of a document in the middle of each."""
    tokens = np.random.default_rng(seed).integers(0, shape.vocab, (count, steps + 1)).astype(np.uint8)
    tokens[:, steps // 2] = 0
    return tokens


def assert_equal(result, row, logits, state, tokens):
    likelihood = oracle.log_likelihood(logits, tokens[1:])
    assert np.array_equal(result.logits[row], logits)
    assert np.array_equal(result.state[row], state)
    assert np.array_equal(result.likelihood[row], likelihood)
    assert result.fitness[row] == likelihood.sum()


def member(noise, shape, generation, index):
    drawn = {p.name: noise.draw(p, generation, [index // 2])[0] for p in shape.parameters}
    return oracle.member_draws(shape.parameters, noise.rank, drawn, 1 - 2 * (index % 2))


@settings(max_examples=25)
@given(
    shape=st.sampled_from(SHAPES),
    rank=st.sampled_from([1, 1, 2, 5]),
    kind=st.sampled_from(["table", "counter"]),
    extreme=st.booleans(),
    sigma_shift=st.integers(0, 6),
    first=st.integers(0, 1000),
    count=st.integers(1, 9),
    steps=st.integers(1, 7),
    chunk=st.sampled_from([1, 2, 3, 6, None]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32),
)
def test_members_are_those_of_the_oracle(
    shape, rank, kind, extreme, sigma_shift, first, count, steps, chunk, threads, seed
):
    shape = ModelShape(*shape)
    params = random_params(shape, seed, extreme=extreme) if seed % 3 else oracle.init_params(shape, seed)
    noise = Noise(seed, rank, kind, 1 << 15)
    tokens = some_windows(shape, 2, steps, seed)
    state = np.random.default_rng(seed).integers(-127, 128, (2, shape.n_layers, shape.hidden)).astype(np.int8)
    members, window = np.arange(first, first + count), np.arange(count) % 2
    row = seed % count
    draws = member(noise, shape, 5, first + row)
    shift = oracle.noise_shift(rank, sigma_shift)
    expected = oracle.forward(params, tokens[window[row], :-1], state[window[row]], draws=draws, shift=shift)
    for backend in BACKENDS:
        made = choose.make_engine(params, noise, sigma_shift=sigma_shift, backend=backend, threads=threads, chunk=chunk)
        result = base.run_members(made, 5, members, tokens, window, state, outputs=ALL)
        assert_equal(result, row, *expected, tokens[window[row]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", ["zeros", "extremes", "all 127", "any"])
def test_the_model_itself_is_that_of_the_oracle(shape, values, backend):
    shape = ModelShape(*shape)
    params = random_params(shape, 1, extreme=values == "extremes")
    if values in ("zeros", "all 127"):
        params = {name: np.full_like(value, 0 if values == "zeros" else 127) for name, value in params.items()}
    tokens = some_windows(shape, 3, 6, 2)
    made = choose.make_engine(params, backend=backend)
    result = base.run_center(made, tokens, outputs=ALL)
    for row in range(3):
        assert_equal(result, row, *oracle.forward(params, tokens[row, :-1]), tokens[row])


def test_the_public_forward_is_that_of_the_oracle(backend):
    shape = ModelShape(256, 64, 2)
    params, tokens = oracle.init_params(shape, 1), np.array([0, 72, 105, 255, 0, 9])
    state = np.full((2, 64), -3, np.int8)
    for before in (None, state):
        expected = oracle.forward(params, tokens, before)
        found = choose.forward(params, tokens, before, backend=backend)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    logits = expected[0]
    assert np.array_equal(
        oracle.log_likelihood(logits[:-1], tokens[1:]), oracle.log_likelihood(logits[:-1], tokens[1:])
    )


def test_results_do_not_depend_on_chunks_threads_or_blocks(backend):
    shape = ModelShape(256, 64, 2)
    params, tokens = oracle.init_params(shape, 1), some_windows(shape, 5, 11, 3)
    members = np.random.default_rng(0).permutation(90)
    found = []
    for chunk, threads, block in [(1, 1, 1), (7, 2, 3), (48, 1, 4), (128, 2, 16)]:
        made = choose.make_engine(params, Noise(table_size=1 << 14), backend=backend, threads=threads, chunk=chunk)
        made.block = block
        found.append(base.run_members(made, 2, members, tokens, members % 5, outputs=ALL))
    for other in found[1:]:
        assert all(np.array_equal(getattr(found[0], name), getattr(other, name)) for name in ALL)


@settings(max_examples=12)
@given(
    shape=st.sampled_from([(65, 16, 1), (50, 24, 1), (17, 66, 1), (2, 3, 2)]),
    rank=st.sampled_from([1, 2, 3]),
    kind=st.sampled_from(["table", "counter"]),
    pairs=st.sampled_from([1, 2, 7, 64, 257]),
    shaping=st.sampled_from(["sign", "normalized"]),
    sign_of_noise=st.booleans(),
    momentum_shift=st.sampled_from([0, 1, 4]),
    alpha=st.sampled_from([1.0, 0.3, 0.01]),
    seed=st.integers(0, 2**32),
)
def test_updates_are_those_of_the_oracle(shape, rank, kind, pairs, shaping, sign_of_noise, momentum_shift, alpha, seed):
    shape = ModelShape(*shape)
    params = random_params(shape, seed, extreme=seed % 2 == 0)
    noise = Noise(seed, rank, kind, 1 << 15)
    rng = np.random.default_rng(seed)
    made = [choose.make_engine(params, noise, backend=backend, threads=2) for backend in BACKENDS]
    momentum = {name: np.zeros(value.shape, np.int32) for name, value in params.items()}
    for generation in range(2):
        weights = update.shape_pairs(rng.integers(-40, -20, 2 * pairs), shaping)
        step = update.make_step(
            weights, alpha, rank, generation=generation, momentum_shift=momentum_shift, sign_of_noise=sign_of_noise
        )
        numbers = np.arange(pairs)
        draws = {p.name: noise.draw(p, generation, numbers) for p in shape.parameters}
        moved = update.update(params, shape.parameters, draws, weights, step, momentum)
        for fast in made:
            assert fast.update(generation, numbers, weights, step) == moved
            assert all(np.array_equal(fast.params[name], params[name]) for name in params)
            if momentum_shift:
                assert all(np.array_equal(fast.momentum[name], momentum[name]) for name in params)


def test_an_engine_goes_on_with_what_it_has_moved(backend):
    shape = ModelShape(256, 16, 1)
    params, noise, tokens = oracle.init_params(shape, 1), Noise(table_size=1 << 14), some_windows(shape, 1, 4, 3)
    made = choose.make_engine(params, noise, backend=backend)
    weights = np.full(40, 16, np.int8)
    moved = made.update(0, np.arange(40), weights, update.make_step(weights, 1.0, 1))
    assert moved > 0.9 * shape.size
    again = choose.make_engine(made.params, noise, backend=backend)
    first, second = (base.run_center(e, tokens, outputs=ALL) for e in (made, again))
    assert np.array_equal(first.logits, second.logits)
    assert not np.array_equal(first.logits[0], oracle.forward(params, tokens[0, :-1])[0])


def test_products_without_integer_units_are_exact(monkeypatch):
    from eggroll.pretrain.engines import torch as torch_engine

    monkeypatch.setattr(torch_engine, "_int_mm_is_exact", lambda: False)
    shape = ModelShape(256, 260, 1)  # 4 D = 1040: beyond what float32 holds exactly
    params = {p.name: np.full(p.shape, 127, np.int8) for p in shape.parameters}
    tokens = some_windows(shape, 1, 3, 0)
    made = choose.make_engine(params, backend="torch")
    assert_equal(base.run_center(made, tokens, outputs=ALL), 0, *oracle.forward(params, tokens[0, :-1]), tokens[0])


@pytest.mark.parametrize("flags", [(), WITHOUT_VNNI], ids=["as it is here", "AVX2"])
@pytest.mark.parametrize("values", ["127", "-127", "-128", "any"])
def test_products_of_all_bytes_and_sizes_are_exact(values, flags):
    made = library.load(*flags)
    if isinstance(made, str):
        pytest.skip(made)
    rng = np.random.default_rng(0)
    for inputs, outputs in [(1, 1), (3, 65), (64, 16), (66, 17), (257, 64), (1040, 1)]:
        weight = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        if values != "any":
            weight[:] = int(values)
        packed, start = library.packed_matrix(made, weight)
        by = fixed_point.divisor(inputs)
        shift = by.bit_length() - 1 if by & (by - 1) == 0 else -1
        matrix = library.Matrix(library.address(packed), library.address(start), inputs, outputs, by, shift, 0, 0)
        for rows in (1, 2, 3, 4, 5, 6, 13, 47, 49, 100):  # every rest of a tile of 6, above and below 48
            x = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), (rows, library.padded(inputs)))
            out = np.empty((rows, library.padded(outputs)), np.int8)
            made.eggroll_multiply(ctypes.byref(matrix), library.address(x), library.address(out), rows)
            sums = (x[:, :inputs].astype(np.int64) - 128) @ weight.T.astype(np.int64)
            assert np.array_equal(out[:, :outputs], np.clip(sums // by, -127, 127))
            assert not out[:, outputs:].any()


@pytest.mark.parametrize("shape", [(256, 64, 1), (17, 100, 1), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_cpus_with_avx2_give_what_the_others_give(shape, rank):
    made = library.load(*WITHOUT_VNNI)
    if isinstance(made, str):
        pytest.skip(made)
    shape, noise = ModelShape(*shape), Noise(3, rank, "table", 1 << 15)
    params, tokens = random_params(shape, 7), some_windows(shape, 2, 5, 7)
    members = np.arange(14)
    c = engine_c.CEngine(made, {k: v.copy() for k, v in params.items()}, shape, noise, 4, 1, None)
    plain = choose.make_engine(params, noise, backend="torch")
    for generation in range(2):
        found = [base.run_members(e, generation, members, tokens, members % 2, outputs=ALL) for e in (c, plain)]
        assert all(np.array_equal(getattr(found[0], name), getattr(found[1], name)) for name in ALL)
        weights = update.shape_pairs(found[0].fitness, "normalized")
        step = update.make_step(weights, 0.3, rank, generation=generation, momentum_shift=generation)
        assert c.update(generation, members[:7], weights, step) == plain.update(generation, members[:7], weights, step)
        assert all(np.array_equal(c.params[name], plain.params[name]) for name in params)


@pytest.mark.parametrize("units", ["-mavx2", "-mavx512f -mavx512bw -mavx512vl -mavx512vnni"])
def test_the_source_compiles_for_all_units_wherever_it_is(units, tmp_path):
    if isinstance(library.load(), str):
        pytest.skip(library.load())
    path = tmp_path / "pretrain.c"
    path.write_text(library.source())
    command = [*compile_c.compiler_command(), *library.FLAGS, *units.split(), "-Werror", "-fsyntax-only", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_pytorch_takes_over(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: "no C compiler found")
    params = oracle.init_params(ModelShape(256, 16, 1))
    assert type(choose.make_engine(params)).__name__ == "TorchEngine"
    with pytest.raises(ConfigError, match="backend='c' cannot be used here: no C compiler found; use backend='torch'"):
        choose.make_engine(params, backend="c")


def test_settings_that_cannot_work():
    params = oracle.init_params(ModelShape(256, 16, 1))
    with pytest.raises(ConfigError, match=r"backend .* must be one of: auto, c, torch"):
        choose.make_engine(params, backend="cuda")
    with pytest.raises(ConfigError, match=r"chunk .* at least 1"):
        choose.make_engine(params, chunk=0)
    with pytest.raises(ConfigError, match="largest draw: emb takes 272 normals at rank 1; use at least 4367 "):
        choose.make_engine(params, Noise(table_size=271))


def test_states_windows_and_tokens_that_do_not_fit_are_refused(backend):
    """An engine in C would read beyond their ends."""
    params = oracle.init_params(ModelShape(20, 16, 2))
    for state in (np.zeros((1, 16), np.int8), np.zeros((2, 15), np.int8), np.zeros((2, 16), np.int64)):
        refused = r"state must be int8 \(L, D\) = \(2, 16\); got " + str(state.dtype)
        with pytest.raises(DataError, match=refused):
            choose.forward(params, [1, 2], state, backend=backend)
        with pytest.raises(DataError, match=refused):
            oracle.forward(params, [1, 2], state)
    made, tokens = choose.make_engine(params, backend=backend), np.ones((2, 4), np.uint8)
    rows = np.arange(2)
    with pytest.raises(DataError, match="tokens must be from 0 to 19; got up to 200"):
        base.run_center(made, np.uint8(200) * tokens, outputs=("logits",))
    with pytest.raises(DataError, match="window must be from 0 to 1; got 0 to 2"):
        base.run_members(made, 0, rows, tokens, 2 * rows)
    with pytest.raises(DataError, match=r"tokens must be windows \(W, T \+ 1\) .* got \(2, 1\)"):
        base.run_center(made, tokens[:, :1], outputs=("logits",))
    with pytest.raises(DataError, match=r"state must be int8 \(W, L, D\) = \(2, 2, 16\); got int8 \(1, 2, 16\)"):
        base.run_members(made, 0, rows, tokens, rows, np.zeros((1, 2, 16), np.int8))
