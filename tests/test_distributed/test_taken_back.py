"""Ctrl-C on a pool: workers leave what they score, so that the run ends at once with the state it has."""

import asyncio
import os
import signal
import threading
import time
from contextlib import nullcontext, suppress

import pytest

from eggroll.distributed import crew as crew_module
from eggroll.distributed import evolve
from eggroll.distributed.host import Host, TakenBackError, check_taken_back
from eggroll.distributed.ray_actor import NUDGE, WorkerActor
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


def test_a_blocking_reward_is_left_at_a_signal():
    """A worker's process looks by itself only between two calls; a signal makes it look within one."""
    wanted = [True]

    class Worker:
        def evaluate(self, generation, sigma, members):
            threading.Timer(0.2, os.kill, (os.getpid(), NUDGE)).start()  # is still wanted
            threading.Timer(0.5, wanted.clear).start()
            threading.Timer(0.6, os.kill, (os.getpid(), NUDGE)).start()
            FunctionReward(lambda completions: time.sleep(20)).score(["p"], ["x"])

    before = signal.getsignal(NUDGE)
    try:
        actor = WorkerActor(1)
        actor._host = Host(lambda reference: reference, lambda: not wanted)
        actor._host.build(Worker)
        began = time.monotonic()
        with pytest.raises((TakenBackError, RewardError)):
            actor.call("evaluate", 0, 0.1, 0, 2)
        assert 0.4 < time.monotonic() - began < 5
        os.kill(os.getpid(), NUDGE)  # outside of an evaluation it does nothing
    finally:
        signal.signal(NUDGE, before)


class Deaf:
    """A transport to one worker that keeps scoring, whatever it is told."""

    sent_bytes = received_bytes = 0

    def __init__(self):
        self.nudged, self.stopped, self.tickets, self.workers = [], [], 0, 0

    def launch(self):
        self.workers += 1
        return self.workers

    def build(self, worker):
        return self.send(worker, "build")

    def send(self, worker, method, *args):
        self.tickets += 1
        return (self.tickets, worker, method)

    def wait(self, tickets, timeout):
        ready = [t for t in tickets if t[2] != "evaluate" and not (t[2] == "state" and t[1] == 1)]
        time.sleep(0 if ready else 0.01)
        return ready

    def result(self, ticket):
        if ticket[2] == "build":
            return None
        return {"hello": {"node": "here", "pid": 0}, "catch_up": (0, 0.0)}.get(ticket[2], "the state")

    def take_back(self, ticket):
        pass

    def nudge(self, info):
        self.nudged.append(info)

    def stop(self, worker):
        self.stopped.append(worker)

    def last_output(self, info):
        return ""

    def shortage(self):
        return "one worker"


def test_a_worker_that_does_not_leave_is_replaced(monkeypatch):
    monkeypatch.setattr(crew_module, "NUDGE_S", 0.05)
    monkeypatch.setattr(crew_module, "GIVEN_UP_S", 0.3)
    transport, said = Deaf(), []
    crew = crew_module.Crew(transport, start_timeout_s=10.0, notify=said.append, on_lost=lambda seat: None)
    crew.add()
    crew.wait_for_lead()
    seat = crew.ready()[0]
    seat.busy.add(crew.send(seat, "evaluate"))
    crew.take_back()
    assert crew.ask_lead("state")[0] == "the state"
    assert transport.stopped == [1]
    assert len(transport.nudged) > 2
    assert said == [
        "worker 0 (pid 0 on here) is gone (it did not leave what it scored within 0 s of the interrupt); its members "
        "are scored by others, and a new one is started"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["async", "blocking", "stubborn"])
def test_ctrl_c_does_not_wait_for_the_workers(kind, cluster, toys, tmp_path):
    flag = tmp_path / "scoring"

    class Slow(toys.NumpyWorker):
        def evaluate(self, generation, sigma, members):
            if generation == 1:
                from eggroll.llm.rewards.event_loop import finished

                flag.touch()
                if kind == "async":
                    finished(asyncio.sleep(60))
                for _ in range(3 if kind == "stubborn" else 1):
                    with suppress(Exception) if kind == "stubborn" else nullcontext():
                        time.sleep(60)
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
