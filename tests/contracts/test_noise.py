"""One table for every implementation of the noise: an address gives the same numbers, whoever draws them.

NumPy is the reference. PyTorch's versions (plain operations, C, Triton) give the same floats, JAX the same bits and
normals that differ by at most 3 units in the last place.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eggroll.core.address import dense_draw, factor_draw, parameter_key
from eggroll.core.noise_spec import NoiseSpec
from eggroll.core.select import ParameterSpec

PARAMETERS = {
    "matrix": ParameterSpec("layers.3.kernel", (5, 7), "matrix"),
    "conv": ParameterSpec("features.0.weight", (4, 3, 2, 2), "conv"),
    "embedding": ParameterSpec("wte", (11, 3), "embedding"),
    "experts": ParameterSpec("experts.up", (2, 3, 4), "experts"),
    "vector": ParameterSpec("bias", (9,), "vector"),
    "not ASCII": ParameterSpec("größe", (6, 1), "matrix"),
}
ADDRESSES = [  # noise, generation, pair
    (NoiseSpec(), 0, 0),
    (NoiseSpec(seed=42, rank=3), 17, 4),
    (NoiseSpec(seed=2**40 + 5, rank=2, noise_reuse=4), 17, 131_071),
    (NoiseSpec(seed=2**64 - 1, antithetic=False), 2**31 - 1, 1),
]


def in_numpy(noise, spec, generation, pair):
    if spec.low_rank:
        return factor_draw(spec, noise.rank, noise.seed, generation, pair, noise_reuse=noise.noise_reuse)
    return (dense_draw(spec, noise.seed, generation, pair, noise_reuse=noise.noise_reuse),)


def in_torch(noise, spec, generation, pair):
    import torch

    from eggroll.torch.noise import Noise

    drawn = Noise([spec], noise.rank, noise.seed, noise.noise_reuse)
    numbers = drawn.draw(generation, [pair], torch.device("cpu"))[spec.name]
    return tuple(part[0].numpy() for part in drawn.factors(spec, numbers)) if spec.low_rank else (numbers[0].numpy(),)


def torch_version(setting):
    def draw(*address):
        from eggroll.torch.kernels import threefry_c

        if setting == "1" and threefry_c.why_not():
            pytest.skip(threefry_c.why_not())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EGGROLL_COMPILE_NOISE", setting)
            return in_torch(*address)

    return draw


def in_triton(noise, spec, generation, pair):
    """Triton's interpreter is chosen when Triton is imported, so all draws are made in a process of its own."""
    return _all_in_triton()[f"{noise} {spec.name} {generation} {pair}"]


_drawn_in_triton = {}


def _all_in_triton():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not _drawn_in_triton:
        code = "import test_noise; test_noise.draw_all_in_triton()"
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for line in done.stdout.splitlines():
            name, *parts = line.split("\t")
            _drawn_in_triton[name] = [np.frombuffer(bytes.fromhex(part), np.float32) for part in parts]
    return _drawn_in_triton


def draw_all_in_triton():
    from eggroll.torch import threefry
    from eggroll.torch.kernels import threefry_triton

    threefry._kernels = lambda device: threefry_triton
    for noise, generation, pair in ADDRESSES:
        for spec in PARAMETERS.values():
            parts = in_torch(noise, spec, generation, pair)
            name = f"{noise} {spec.name} {generation} {pair}"
            sys.stdout.write("\t".join([name, *(np.ascontiguousarray(part).tobytes().hex() for part in parts)]) + "\n")


def in_jax(noise, spec, generation, pair):
    pytest.importorskip("jax")
    from eggroll.jax.noise import Leaf, draw

    batch = len(spec.batch_shape)
    drawn = draw(noise, Leaf(spec.name, spec.shape, batch, 1 if spec.low_rank else 0), generation, pair)
    return drawn if spec.low_rank else (drawn,)


def in_a_noiser(noise, spec, generation, pair):
    """The HyperscaleES interface: from a parameter's key as ``base_key``."""
    jax = pytest.importorskip("jax")
    from eggroll.jax.noiser import _draws

    words = jax.numpy.array(parameter_key(noise.seed, spec.name), jax.numpy.uint32)
    key = _draws.draw_key(jax.random.wrap_key_data(words, impl="threefry2x32"), noise.epoch(generation), pair)
    if not spec.low_rank:
        return (_draws.dense_draw(key, spec.shape, "float32"),)
    if spec.batch_shape:
        pytest.skip("a noiser has a key for every slice of a stack")
    return _draws.factor_draw(key, spec.matrix_shape, "float32", noise.rank)


IMPLEMENTATIONS = {
    "torch, plain operations": (torch_version("0"), 0),
    "torch, C": (torch_version("1"), 0),
    "torch, Triton": (in_triton, 0),
    "jax": (in_jax, 3),
    "jax, noiser": (in_a_noiser, 3),
}


def ordinal(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64).reshape(-1)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@pytest.mark.parametrize(("noise", "generation", "pair"), ADDRESSES, ids=["zeros", "rank 3", "reuse", "largest"])
@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_address_gives_the_same_numbers(implementation, parameter, noise, generation, pair):
    draw, ulps = IMPLEMENTATIONS[implementation]
    spec = PARAMETERS[parameter]
    expected = in_numpy(noise, spec, generation, pair)
    got = draw(noise, spec, generation, pair)
    assert len(got) == len(expected) == (2 if spec.low_rank else 1)
    for mine, reference in zip(got, expected, strict=True):
        assert np.size(mine) == reference.size > 0
        assert np.abs(ordinal(mine) - ordinal(reference)).max() <= ulps


def test_different_addresses_give_different_numbers():
    spec = PARAMETERS["matrix"]
    first = in_numpy(NoiseSpec(seed=1), spec, 2, 3)[0]
    for other in ((NoiseSpec(seed=2), 2, 3), (NoiseSpec(seed=1), 3, 3), (NoiseSpec(seed=1), 2, 4)):
        assert not np.array_equal(in_numpy(other[0], spec, *other[1:])[0], first)


def test_members_share_draws_as_the_settings_say():
    pairs, alone = NoiseSpec(), NoiseSpec(antithetic=False)
    assert [pairs.draw_of(member) for member in range(4)] == [(0, 1), (0, -1), (1, 1), (1, -1)]
    assert [alone.draw_of(member) for member in range(3)] == [(0, 1), (1, 1), (2, 1)]
    assert (pairs.num_draws(6), alone.num_draws(6)) == (3, 6)
    weights = np.array([1.0, 2.0, 5.0, -1.0])
    np.testing.assert_array_equal(pairs.draw_weights(weights), [-1.0, 6.0])
    np.testing.assert_array_equal(alone.draw_weights(weights), weights)
    assert [NoiseSpec(noise_reuse=3).epoch(generation) for generation in range(5)] == [0, 0, 0, 1, 1]
    assert NoiseSpec(seed=2**64, rank=1).problems() == [f"seed (={2**64}) must be below 2**64"]
