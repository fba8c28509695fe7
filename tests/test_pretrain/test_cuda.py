"""On a CUDA device: forward, members, fitness and updates equal the oracle's, bit for bit. Left out without one."""

import numpy as np
import pytest
import torch

from eggroll.pretrain import update
from eggroll.pretrain.engines import base, choose
from eggroll.pretrain.model import oracle
from eggroll.pretrain.model.noise import Noise
from eggroll.pretrain.model.shape import ModelShape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("hidden", "rank", "kind"), [(64, 1, "table"), (64, 2, "counter"), (100, 1, "table")])
@pytest.mark.parametrize("triton", [True, False])
def test_members_and_updates_are_those_of_the_oracle(hidden, rank, kind, triton):
    shape, noise = ModelShape(256, hidden, 2), Noise(7, rank, kind, 1 << 16)
    params = oracle.init_params(shape, 3)
    made = choose.make_engine(params, noise, backend="torch", device="cuda", chunk=7)
    if not triton:
        made.fused = False
    tokens = np.random.default_rng(0).integers(0, 256, (2, 6)).astype(np.uint8)
    tokens[:, 3] = 0
    members, window = np.arange(20), np.arange(20) // 10
    found = base.run_members(made, 4, members, tokens, window, outputs=("fitness", "logits", "state"))
    assert made.fused is triton
    for member in (0, 9, 19):
        drawn = {p.name: noise.draw(p, 4, [member // 2])[0] for p in shape.parameters}
        draws = oracle.member_draws(shape.parameters, rank, drawn, 1 - 2 * (member % 2))
        logits, state = oracle.forward(
            params, tokens[window[member], :-1], draws=draws, shift=oracle.noise_shift(rank, 4)
        )
        assert np.array_equal(found.logits[member], logits)
        assert np.array_equal(found.state[member], state)
        assert found.fitness[member] == oracle.log_likelihood(logits, tokens[window[member], 1:]).sum()
    for pairs in (3, 1024, 1100):  # more than are in memory at once, and as many
        numbers = np.arange(pairs, dtype=np.int64)
        weights = np.random.default_rng(pairs).choice(np.array([-16, 16], np.int8), pairs)
        expected = {name: value.copy() for name, value in made.params.items()}
        step = update.make_step(weights, 0.5, rank)
        drawn = {p.name: noise.draw(p, 1, numbers) for p in shape.parameters}
        moved = update.update(expected, shape.parameters, drawn, weights, step)
        assert made.update(1, numbers, weights, step) == moved
        assert all(np.array_equal(made.params[name], expected[name]) for name in expected)
