"""Real worker processes, one of which is killed: the weights are those of one process."""

import dataclasses

import numpy as np
import pytest

from eggroll.pretrain import kind
from eggroll.run.run_dir import RunDir

pytest.importorskip("ray")


class Kills:
    """A listener that ends a worker's process after the second generation."""

    def __init__(self, pool):
        self.pool = pool

    def generation(self, metrics):
        if metrics["generation"] == 2:
            self.pool.kill(self.pool.workers()[0]["number"])


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(options):
    alone = kind.train(options)
    shared = dataclasses.replace(options, workers=2, output=f"{options.output}-shared")
    told = []
    done = kind.train(shared, opened=lambda run: [Kills(run.worker)], notify=told.append)
    assert any("its members are scored by others" in text for text in told), told
    assert RunDir.open(shared.output).updates() == RunDir.open(options.output).updates()
    found, expected = (dict(one.worker.state_tensors()) for one in (done, alone))
    assert all(np.array_equal(np.asarray(found[name]), np.asarray(expected[name])) for name in expected)
    names = ("validation_bits_per_byte", "validation_bytes", "generations", "member_tokens")
    assert {name: done.result[name] for name in names} == {name: alone.result[name] for name in names}
