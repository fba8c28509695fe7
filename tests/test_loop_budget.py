"""A run that may take only so many seconds ends in time, with everything that an end has."""

from types import SimpleNamespace

import numpy as np
import pytest

from eggroll import loop as loop_module
from eggroll.core.config import ESConfig
from eggroll.loop import Evaluation, Heldout, Loop, time_spent
from eggroll.run.run_dir import RunDir

GENERATION_S = 10.0


class Slow:
    """A worker whose generations take ten seconds of a clock that only they move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(loop_module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def evaluate(self, generation, sigma, members):
        self.now += GENERATION_S
        return Evaluation(np.random.default_rng(generation).normal(size=len(members)))

    def heldout(self, generation):
        return Heldout(float(generation))

    def apply(self, record):
        return 1.0

    def state_tensors(self):
        return {}

    def load_state_tensors(self, tensors):
        pass


def make(worker, run, seconds):
    config = ESConfig(population_size=4, generations=20)
    return Loop(config, worker, run, heldout=True, eval_every=10, checkpoint_every=50, seconds=seconds)


@pytest.mark.parametrize(("seconds", "generations"), [(1.0, 1), (31.0, 3), (36.0, 4), (1000.0, 20)])
def test_it_ends_after_the_last_generation_that_fits(monkeypatch, tmp_path, seconds, generations):
    """At the nearest end of a generation, with a held-out score and a checkpoint of it."""
    run = RunDir.create(tmp_path / "run", {})
    history = make(Slow(monkeypatch), run, seconds).go()
    assert len(history) == generations
    assert history[-1]["heldout_reward"] == generations
    assert run.latest_checkpoint().generation == generations


def test_a_resumed_run_has_what_is_left(monkeypatch, tmp_path):
    """The time of all sittings counts, and more may be given."""
    run, worker = RunDir.create(tmp_path / "run", {}), Slow(monkeypatch)
    assert len(make(worker, run, 31.0).go()) == 3
    again = make(worker, run, 31.0)
    assert again.resume() == 3
    assert len(again.go(3)) == 3
    more = make(worker, run, 51.0)
    assert more.resume() == 3
    assert len(more.go(3)) == 5
    assert time_spent(more.history) == 5 * GENERATION_S


def test_the_time_of_all_sittings():
    assert time_spent([]) == 0
    assert time_spent([{"elapsed_s": second} for second in (1.0, 2.0, 0.5, 3.0, 2.0)]) == 2.0 + 3.0 + 2.0
