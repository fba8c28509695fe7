"""Workers in processes of their own: what they compute, what travels, what happens when they are killed."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from eggroll.distributed import LocalPool, RayPool
from eggroll.distributed.crew import DigestWarning, WorkerWarning
from eggroll.loop import Loop
from eggroll.run.run_dir import RunDir

SIZE = 32


def run(pool, settings, **more):
    return Loop(settings, pool, **more).go()


def state(pool):
    return {name: value.clone() for name, value in pool.state_tensors().items()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def alone(toys):
    """What one worker in this process ends with, without a fault."""
    with LocalPool(toys.NumpyWorker, population_size=SIZE) as pool:
        run(pool, toys.config())
        return state(pool)


@pytest.fixture
def killing(tmp_path):
    """Kills workers while they score a generation: each writes who it is to the log when it begins a range."""
    log, threads, killed = tmp_path / "log", [], []

    def kill(generation, victims):
        def watch():
            deadline = time.monotonic() + 60
            while len(killed) < victims and time.monotonic() < deadline:
                lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
                for number, pid in lines:
                    if int(number) == generation and int(pid) not in killed and len(killed) < victims:
                        os.kill(int(pid), signal.SIGKILL)
                        killed.append(int(pid))
                time.sleep(0.002)

        threads.append(threading.Thread(target=watch))
        threads[-1].start()
        return killed

    kill.log = log
    yield kill
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("model", [pytest.param("module", marks=pytest.mark.slow), "numpy"])
def test_one_two_and_four_workers_have_the_same_weights(cluster, toys, alone, model):
    """Ten generations, bit for bit; four workers compare their weights after each of them."""
    settings = toys.config(optimizer="adam", lr=0.05) if model == "module" else toys.config()
    factory = toys.factory(settings) if model == "module" else toys.NumpyWorker
    with LocalPool(factory, population_size=SIZE) as pool:
        history = run(pool, settings)
        expected = state(pool)
    with RayPool(factory, workers=4, population_size=SIZE, check_every=1) as pool:
        pool.wait_until_ready(4)
        assert [line["fitness_mean"] for line in run(pool, settings)] == [line["fitness_mean"] for line in history]
        assert same(state(pool), expected)
    for workers in (1, 2) if model == "numpy" else ():  # PyTorch takes seconds to load, in each process
        with RayPool(factory, workers=workers, population_size=SIZE) as pool:
            pool.wait_until_ready(workers)
            run(pool, settings)
            assert same(state(pool), expected)


@pytest.mark.parametrize("victims", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_killed_in_the_middle_of_a_generation_change_nothing(cluster, toys, alone, killing, victims, tmp_path):
    """With two workers and two victims, all are gone at some point or another and the first weights are made again."""
    directory = RunDir.create(tmp_path / "run", {}) if victims == 2 else None
    factory = lambda: toys.NumpyWorker(sleep=0.01, log=killing.log)  # noqa: E731
    with RayPool(factory, workers=2, population_size=SIZE) as pool:
        pool.wait_until_ready(2)
        killed = killing(4, victims)
        with pytest.warns(WorkerWarning, match=r"worker \d+ \(pid \d+ on .*\) is gone .*connection error"):
            history = run(pool, toys.config(), run=directory, checkpoint_every=3)
        assert len(killed) == victims
        assert sum(line["ranges_repeated"] for line in history) >= victims
        assert same(state(pool), alone)
        assert not set(killed) & {one.get("pid") for one in pool.workers()}
        pool.wait_until_ready(2)


def test_a_worker_added_in_the_middle_takes_part_in_the_next_generation(cluster, toys, alone, tmp_path):
    log = tmp_path / "log"
    with RayPool(lambda: toys.NumpyWorker(sleep=0.01, log=log), workers=1, population_size=SIZE) as pool:

        def add(metrics):
            if metrics["generation"] == 5:
                pool.add_worker()
                pool.wait_until_ready(2)
            return False

        history = run(pool, toys.config(), stop=add)
        assert [line["workers"] for line in history] == [1] * 5 + [2] * 5
        assert same(state(pool), alone)
    seen = {}
    for line in log.read_text().splitlines():
        generation, pid = map(int, line.split())
        seen.setdefault(generation, set()).add(pid)
    assert [len(seen[generation]) for generation in range(10)] == [1] * 5 + [2] * 5


@pytest.mark.slow
def test_a_worker_without_a_place_joins_when_there_is_one(cluster, toys):
    told = []
    with RayPool(toys.NumpyWorker, workers=3, population_size=SIZE, cpus_per_worker=4, notify=told.append) as pool:
        pool.wait_until_ready(2)
        pool.evaluate(0, 0.1)
        assert sorted(one["phase"] for one in pool.workers()) == ["ready", "ready", "waiting"]
        ready = next(one for one in pool.workers() if one["phase"] == "ready")
        pool._crew._lost(pool._crew._seats[ready["number"]], "taken away")
        pool.wait_until_ready(2)
        assert pool.evaluate(0, 0.1).fitness.shape == (SIZE,)
        assert "taken away" in told[0]


def test_bytes_grow_with_the_population_and_not_with_the_model(cluster, toys):
    def bytes_of(size, population_size):
        settings = toys.config(population_size=population_size, generations=3)
        with RayPool(lambda: toys.NumpyWorker(size), workers=1, population_size=population_size, range_size=8) as pool:
            run(pool, settings)
            assert np.prod(pool.state_tensors()["parameter/theta"].shape) == size
            line = run(pool, settings)[-1]
        return line["sent_bytes"], line["received_bytes"]

    small, large, twice = bytes_of(10, 128), bytes_of(100_000, 128), bytes_of(10, 256)
    assert small == large
    assert sum(small) < 128 * 40
    assert 1.5 * sum(small) < sum(twice) < 2.1 * sum(small)


def test_different_weights_are_noticed_and_mended(cluster, toys, alone, tmp_path):
    with RayPool(
        lambda: toys.NumpyWorker(tamper=(tmp_path / "m", 2)), workers=2, population_size=SIZE, check_every=3
    ) as pool:
        pool.wait_until_ready(2)
        with pytest.warns(
            DigestWarning, match=r"after 3 updates the weights of worker 1 \(pid .*not those of worker 0"
        ):
            run(pool, toys.config())
        for number in (0, 1):
            ticket = pool._transport.send(pool._crew._seats[number].handle, "state")
            assert np.array_equal(
                pool._transport.result(ticket)["parameter/theta"][2].view(np.float32), pool_theta(pool)
            )


def pool_theta(pool):
    return pool.state_tensors()["parameter/theta"].numpy()
