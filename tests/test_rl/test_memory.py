"""What a run is about to take is said before it takes it, and refused where it cannot fit."""

import pytest

from eggroll.errors import MemoryBudgetError
from eggroll.lifecycle import memory
from eggroll.rl import RLConfig
from eggroll.rl.kind import KIND


def test_a_million_members_are_announced(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: (16 * 10**9, 10**9))
    plan = KIND.plan(RLConfig(env="CartPole-v1", population_size=1_000_000, preset="small", hidden=32, layers=1))
    line = next(line for line in plan.describe(None) if "passes" in line)
    assert line == (
        "a generation is at most 500,000,000 environment steps in 3,907 passes of 256 members; about 224.3 MB of memory"
    )


@pytest.mark.parametrize("env", ["CartPole-v1", "gymnasium/CartPole-v1"])
def test_what_cannot_fit_is_refused_before_anything_is_made(env, monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: (10**9, 10**9))
    config = RLConfig(env=env, population_size=1_000_000, preset="small", members_per_forward=0)
    message = (
        r"a population of 1,000,000 members in .*CartPole-v1 needs \d+\.\d+ GB \(weights and optimizer .*, noise of "
        r"the members that play together \d.*, their episodes \d.*, compiled programs 200\.0 MB, returns of all "
        r"members 24\.0 MB\), and this machine has 1\.00 GB\. Ways out: fewer members at once "
    )
    with pytest.raises(MemoryBudgetError, match=message):
        KIND.plan(config)
