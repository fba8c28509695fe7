"""What the tests of the run directory share."""

from __future__ import annotations

import numpy as np
import pytest

from eggroll.core.records import UpdateRecord
from eggroll.run import RunDir


@pytest.fixture
def record():
    """Makes the record of a generation; always the same one for the same generation."""

    def make(generation: int, size: int = 4) -> UpdateRecord:
        weights = np.random.default_rng(generation).standard_normal(size).astype(np.float32)
        return UpdateRecord.make(generation, 0.01 * 0.9**generation, 0.1, weights)

    return make


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "demo", {"generations": 10, "sigma": 0.01, "layers": (1, 2)})


@pytest.fixture
def five(run, record):
    """A run of five generations, logged in the order that a loop uses, with a first evaluation."""
    run.append_metrics({"generation": 0, "event": "start", "heldout_reward": -2.0})
    for generation in range(5):
        run.append_samples([{"generation": generation + 1, "member": 0, "prompt": "p", "completion": "c"}])
        run.append_metrics({"generation": generation + 1, "fitness_mean": generation / 7})
        run.append_update(record(generation))
    return run
