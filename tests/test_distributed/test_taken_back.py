"""Ctrl-C on a pool: workers leave what they score, so that the run ends at once with the state it has."""

import asyncio
import os
import signal
import threading
import time

import pytest

from eggroll.distributed import evolve
from eggroll.distributed.host import Host, TakenBackError, check_taken_back
from eggroll.errors import RewardError
from eggroll.llm.rewards import FunctionReward


def test_code_within_an_evaluation_is_told():
    class Worker:
        def evaluate(self, generation, sigma, members):
            check_taken_back()

    wanted = Host(lambda reference: reference, lambda: False)
    wanted.build(Worker)
    with pytest.raises(AttributeError):  # as None is no evaluation
        wanted.evaluate(0, 0.1, 0, 2)
    taken_back = Host(lambda reference: reference, lambda: True)
    taken_back.build(Worker)
    with pytest.raises(TakenBackError):
        taken_back.evaluate(0, 0.1, 0, 2)
    check_taken_back()  # outside of one it does nothing


def test_an_async_reward_is_cancelled():
    ended = threading.Event()

    async def slow(completions):
        try:
            await asyncio.sleep(20)
        finally:
            ended.set()

    class Worker:
        def evaluate(self, generation, sigma, members):
            FunctionReward(slow).score(["p"], ["x"])

    host = Host(lambda reference: reference, lambda: True)
    host.build(Worker)
    FunctionReward(lambda completions: [1.0]).score(["p"], ["x"])  # imports what it needs
    began = time.monotonic()
    with pytest.raises((TakenBackError, RewardError)):
        host.evaluate(0, 0.1, 0, 2)
    assert time.monotonic() - began < 5
    assert ended.wait(5)


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_the_workers(cluster, toys, tmp_path):
    flag = tmp_path / "scoring"

    class Slow(toys.NumpyWorker):
        def evaluate(self, generation, sigma, members):
            if generation == 1:
                from eggroll.llm.rewards.event_loop import finished

                flag.touch()
                finished(asyncio.sleep(60))
            return super().evaluate(generation, sigma, members)

    pressed = []

    def press():
        while not flag.exists():
            time.sleep(0.05)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    found = evolve(Slow, toys.config(), workers=2, notify=print, run=tmp_path / "run")
    assert time.monotonic() - pressed[0] < 20
    assert found.interrupted
    assert [line["generation"] for line in found.history] == [1]
    assert found.state
    assert (tmp_path / "run/checkpoints/generation-000001").is_dir()
