"""The oracle against the formulas, worked out with Python's whole numbers."""

import math

import numpy as np
import pytest

from eggroll.errors import DataError, ModelError
from eggroll.pretrain.model import oracle
from eggroll.pretrain.model.shape import ModelShape

SHAPE = ModelShape(7, 4, 2)


def random_params(shape, seed, *, extreme=False):
    """Parameters of a shape: any int8 from -127 to 127, or only the ends and 0."""
    rng = np.random.default_rng(seed)
    if extreme:
        return {p.name: rng.choice(np.array([-127, 0, 127], np.int8), p.shape) for p in shape.parameters}
    return {p.name: rng.integers(-127, 128, p.shape).astype(np.int8) for p in shape.parameters}


def clip(x):
    return max(-127, min(127, x))


def product(x, weight):
    by = round(16 * math.sqrt(len(x)))
    return [clip(sum(int(a) * int(b) for a, b in zip(x, row, strict=True)) // by) for row in weight]


def norm(x, weight):
    size = max(1, sum(abs(v) for v in x) // len(x))
    return [clip(v * int(w) // size) for v, w in zip(x, weight, strict=True)]


def by_hand(params, tokens, state):
    """The whole model on lists of Python's whole numbers."""
    logits, state = [], [[int(v) for v in row] for row in state]
    for token in tokens:
        if token == 0:
            state = [[0] * len(row) for row in state]
        x = [int(v) for v in params["emb"][token]]
        for i in range(len(state)):
            block = {name.removeprefix(f"blocks.{i}."): value for name, value in params.items()}
            u, s = norm(x, block["ln1"]), state[i]
            sums = zip(product(u, block["gru.Wf"]), product(s, block["gru.Uf"]), block["gru.bf"], strict=True)
            gate = [clip(a + b + int(c)) + 127 for a, b, c in sums]
            kept = [(g * v) >> 8 for g, v in zip(gate, s, strict=True)]
            sums = zip(product(u, block["gru.Wh"]), product(kept, block["gru.Uh"]), block["gru.bh"], strict=True)
            new = [clip(a + b + int(c)) for a, b, c in sums]
            state[i] = [v + ((g * (h - v)) >> 8) for v, g, h in zip(s, gate, new, strict=True)]
            x = [clip(a + b) for a, b in zip(x, state[i], strict=True)]
            inner = product(norm(x, block["ln2"]), block["mlp.up"])
            x = [clip(a + b) for a, b in zip(x, product(inner, block["mlp.down"]), strict=True)]
        logits.append(product(norm(x, params["ln_out"]), params["head"]))
    return np.array(logits), np.array(state)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_forward_is_the_formulas(seed, extreme):
    params = random_params(SHAPE, seed, extreme=extreme)
    rng = np.random.default_rng(seed)
    tokens, state = rng.integers(0, 7, 9), rng.integers(-127, 128, (2, 4)).astype(np.int8)
    before = {name: value.copy() for name, value in params.items()}
    logits, after = oracle.forward(params, tokens, state)
    exact_logits, exact_state = by_hand(params, tokens, state)
    assert (logits.dtype, after.dtype) == (np.int8, np.int8)
    assert np.array_equal(logits, exact_logits)
    assert np.array_equal(after, exact_state)
    assert all(np.array_equal(params[name], before[name]) for name in params)  # pure


def test_a_sequence_may_be_cut_anywhere():
    params, tokens = oracle.init_params(SHAPE, 3), np.array([3, 1, 0, 4, 6, 2])
    whole, last = oracle.forward(params, tokens)
    first, state = oracle.forward(params, tokens[:2])
    rest, end = oracle.forward(params, tokens[2:], state)
    assert np.array_equal(np.concatenate([first, rest]), whole)
    assert np.array_equal(end, last)


def test_a_document_begins_without_a_past():
    params = random_params(SHAPE, 1)
    alone = oracle.forward(params, np.array([0, 5, 6]))[0]
    after_others = oracle.forward(params, np.array([3, 4, 2, 0, 5, 6]))[0][3:]
    assert np.array_equal(alone, after_others)
    assert not np.array_equal(alone[1:], oracle.forward(params, np.array([3, 5, 6]))[0][1:])


def test_layer_norm_clamps_after_dividing_and_rounds_down():
    one = np.full(4, 16, np.int8)
    # sum|x| = 3, below D: the divisor is 1 and not 0.
    assert oracle.layer_norm(np.array([1, -1, 1, 0], np.int8), one).tolist() == [16, -16, 16, 0]
    assert oracle.layer_norm(np.array([100, -50, 33, 0], np.int8), one).tolist() == [35, -18, 11, 0]  # divisor 45


def test_log_likelihood_is_that_of_powers_of_two_to_a_sixteenth():
    rng = np.random.default_rng(0)
    logits, targets = rng.integers(-127, 128, (200, 256)).astype(np.int8), rng.integers(0, 256, 200)
    found = oracle.log_likelihood(logits, targets)
    wide = logits.astype(float)
    exact = wide[np.arange(200), targets] - 16 * np.log2((2 ** (wide / 16)).sum(axis=1))
    assert found.dtype == np.int32
    assert np.abs(found - exact).max() <= 0.6  # half a step of the logarithm, and the rounding of the powers
    assert oracle.log_likelihood(np.zeros((1, 256), np.int8), [9]).tolist() == [-128]  # 8 bits


def test_initial_values():
    params = oracle.init_params(ModelShape(), 5)
    assert ModelShape().size == sum(value.size for value in params.values()) == 513 * 256 + 6 * (4 * 256 + 12 * 65536)
    assert set(params["ln_out"]) == {16}
    assert not params["blocks.3.gru.bh"].any()
    weights = params["blocks.2.mlp.up"].astype(float)
    assert abs(weights.std() - 16) < 0.1
    assert not np.array_equal(params["blocks.2.gru.Wf"], params["blocks.3.gru.Wf"])


def test_the_perturbation_has_the_promised_size():
    rng = np.random.default_rng(0)
    for rank in (1, 2, 4, 16):
        a, b = (np.rint(16 * rng.standard_normal((rank, 300))).astype(np.int64) for _ in "ab")
        size = ((b.T @ a) >> oracle.noise_shift(rank, 4)).std() / 16 / 2**-4
        assert (0.9 if rank in (1, 4, 16) else 0.65) < size < 1.15


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([], int), "T >= 1"),
        (np.array([1.0]), "whole numbers"),
        (np.array([[1]]), r"\(T,\)"),
        (np.array([1, 7]), "must be from 0 to 6; got 1 to 7"),
        (np.array([-1]), "must be from 0 to 6"),
    ],
)
def test_tokens_that_are_none(tokens, message):
    with pytest.raises(DataError, match=message):
        oracle.forward(random_params(SHAPE, 0), tokens)


def test_parameters_that_make_no_model():
    params = random_params(SHAPE, 0)
    with pytest.raises(ModelError, match=r"head: missing, expected \(7, 4\)"):
        oracle.forward({k: v for k, v in params.items() if k != "head"}, np.array([1]))
    with pytest.raises(ModelError, match=r"ln_out: \(5,\), expected \(4,\)"):
        oracle.forward({**params, "ln_out": np.zeros(5, np.int8)}, np.array([1]))
    with pytest.raises(ModelError, match="must be int8; ln_out are float64"):
        oracle.forward({**params, "ln_out": np.zeros(4)}, np.array([1]))
    with pytest.raises(ModelError, match="vocab \\(=300\\) must be 1 to 256"):
        oracle.forward({**params, "emb": np.zeros((300, 4), np.int8)}, np.array([1]))
