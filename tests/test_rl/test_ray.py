"""Policies on real worker processes, one of which is killed: the weights are those of one worker in this process."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")
ray = pytest.importorskip("ray")

from eggroll.distributed import LocalPool  # noqa: E402
from eggroll.loop import Loop  # noqa: E402
from eggroll.rl import RLConfig, make_worker, train  # noqa: E402


class Kills:
    """A listener that ends a worker's process after the second generation."""

    def __init__(self, pool):
        self.pool = pool

    def generation(self, metrics):
        if metrics["generation"] == 2:
            self.pool.kill(self.pool.workers()[0]["number"])


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("env", "library"), [("CartPole-v1", "gymnax"), ("gymnasium/CartPole-v1", "gymnasium")])
def test_processes_and_a_killed_one_change_nothing(env, library, tmp_path, cluster):
    pytest.importorskip(library)
    config = RLConfig(
        env=env, generations=4, workers=2, population_size=8, hidden=8, layers=1, max_steps=20, eval_episodes=4,
        report_to="none", output=str(tmp_path / "run"),
    )  # fmt: skip
    told = []
    found = train(config, opened=lambda run: [Kills(run.worker)], notify=told.append)
    assert any("its members are scored by others" in text for text in told), told
    with LocalPool(lambda: make_worker(config), population_size=8) as pool:
        history = Loop(found.plan.config, pool).go()
        expected = pool.state_tensors()
    tensors = found.worker.state_tensors()
    assert sorted(tensors) == sorted(expected)
    assert all(np.array_equal(tensors[name], np.asarray(expected[name])) for name in tensors)
    assert found.result["env_steps"] == history[-1]["env_steps"] > 0
