"""The noise: addresses, both kinds, how much members share, and the C library's draws."""

import numpy as np
import pytest

from eggroll.core import threefry
from eggroll.core.address import parameter_key
from eggroll.errors import ConfigError
from eggroll.pretrain.engines import library
from eggroll.pretrain.model import fixed_point
from eggroll.pretrain.model.noise import TABLE_NAME, Noise
from eggroll.pretrain.model.oracle import normals
from eggroll.pretrain.model.shape import ModelShape

SHAPE = ModelShape(256, 64, 1)
BY_NAME = {p.name: p for p in SHAPE.parameters}
W = BY_NAME["blocks.0.gru.Wf"]


@pytest.mark.parametrize("kind", ["table", "counter"])
def test_a_draw_is_a_function_of_its_address(kind):
    noise = Noise(7, 2, kind, 1 << 16, reuse=3)
    drawn = noise.draw(W, 4, [0, 9, 5])
    assert (drawn.shape, drawn.dtype) == ((3, 2, 128), np.int8)
    assert np.array_equal(
        Noise(7, 2, kind, 1 << 16, reuse=3).draw(W, 5, [9])[0], drawn[1]
    )  # generation 4 // 3 == 5 // 3
    others = [
        noise.draw(W, 6, [9]),
        noise.draw(BY_NAME["blocks.0.gru.Uf"], 4, [9]),
        Noise(8, 2, kind, 1 << 16, reuse=3).draw(W, 4, [9]),
        drawn[2:],
    ]
    assert not any(np.array_equal(other[0], drawn[1]) for other in others)


def test_a_normal_of_the_counter_is_half_a_word():
    bits = threefry.random_bits((3, 9), 2)
    table = fixed_point.normal_table()
    assert normals((3, 9), 3).tolist() == [table[bits[0] & 0xFFFF], table[bits[0] >> 16], table[bits[1] & 0xFFFF]]


def test_the_table_is_the_draw_of_one_key():
    noise = Noise(5, table_size=(1 << 20) + 77)
    assert np.array_equal(noise.table(), normals(parameter_key(5, TABLE_NAME), (1 << 20) + 77))


@pytest.mark.parametrize("rank", [1, 3])
def test_offsets_fill_the_table_and_never_leave_it(rank):
    noise = Noise(1, rank, table_size=5000)
    offsets = noise.offsets(W, 0, np.arange(20000))
    last = 5000 - W.draw_length(rank)
    assert offsets.min() == 0
    assert offsets.max() == last
    # Uniform: the mean of 20000 draws deviates by sqrt(1/12 / 20000) = 0.2 % of the range.
    assert abs(offsets.mean() / last - 0.5) < 0.01


def test_members_overlap_as_often_as_chance_says_and_are_uncorrelated():
    """In a table of 2^16, draws of 128: overlaps, equal offsets, and correlations of the perturbations themselves."""
    pairs, size, length = 400, 1 << 16, W.draw_length(1)
    noise = Noise(3, 1, table_size=size)
    offsets = noise.offsets(W, 0, np.arange(pairs))
    apart = np.abs(offsets[:, None] - offsets[None])[np.triu_indices(pairs, 1)]
    # 79800 pairs of pairs; each overlaps with probability 2 x 128 / 65409 = 0.39 %: 312 expected, sqrt(312) = 18
    assert abs((apart < length).sum() - 312) < 5 * 18
    assert (apart == 0).sum() < 8  # 1.2 expected
    drawn = noise.draw(W, 0, np.arange(pairs)).astype(float)[:, 0]
    b, a = drawn[:, :64], drawn[:, 64:]
    # The correlation of two perturbations A B^T is the product of those of their factors.
    unit_a, unit_b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (a, b))
    together = ((unit_a @ unit_a.T) * (unit_b @ unit_b.T))[np.triu_indices(pairs, 1)]
    overlapping = together[(apart < length) & (apart > 0)]
    # Of two independent ones it is normal factors' 1/8 x 1/8 = 0.016; shifted runs of one table do no worse.
    assert abs(together[apart >= length].std() - 1 / 64) < 0.001
    assert overlapping.std() < 0.02
    assert np.abs(overlapping).max() < 0.1


@pytest.mark.parametrize("kind", ["table", "counter"])
def test_draws_are_normal(kind):
    drawn = Noise(0, 1, kind).draw(BY_NAME["blocks.0.mlp.up"], 3, np.arange(300)).astype(float)
    # 96,000 draws of standard deviation 16: the mean's is 0.05, that of the standard deviation 0.04.
    assert abs(drawn.mean()) < 0.2
    assert abs(drawn.std() - 16) < 0.2


def test_the_library_draws_the_same():
    found = library.load()
    if isinstance(found, str):
        pytest.skip(found)
    keys = np.array([[1, 2], [0xFFFFFFFF, 0x80000000]], np.uint64)
    words, table = (keys[:, 0] << np.uint64(32)) | keys[:, 1], fixed_point.normal_table()
    for length in (1, 63, 64, 1000, 4097):
        made = np.empty((2, length), np.int8)
        found.eggroll_normals(words.ctypes.data, 2, length, table.ctypes.data, made.ctypes.data)
        assert np.array_equal(made, [normals((int(hi), int(lo)), length) for hi, lo in keys])


def test_a_table_that_is_too_small_or_too_large():
    with pytest.raises(ConfigError, match=r"noise_table_size \(=639\) is smaller than the largest draw: emb takes 640"):
        Noise(rank=2, table_size=639).check(SHAPE)
    few = r"leaves the largest draw 1 places to begin.* use at least 4735 \(better 16777216\), or noise='counter'"
    with pytest.raises(ConfigError, match=few):
        Noise(rank=2, table_size=640).check(SHAPE)
    Noise(rank=2, table_size=4735).check(SHAPE)
    Noise(rank=2, kind="counter", table_size=1).check(SHAPE)
    with pytest.raises(ConfigError, match="at most 2\\*\\*31"):
        Noise(table_size=2**32).check(SHAPE)
    with pytest.raises(ConfigError, match="one of: table, counter"):
        Noise(kind="hash")
