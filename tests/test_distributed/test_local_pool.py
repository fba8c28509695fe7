"""What pools do that needs no processes: merging, catching up, comparing, deaths, with workers in this process."""

import pickle

import numpy as np
import pytest
import torch

import eggroll.distributed as distributed
from eggroll.core.records import UpdateRecord
from eggroll.distributed.crew import DigestWarning, WorkerWarning
from eggroll.distributed.history import History
from eggroll.distributed.host import Host, OutOfStepError, from_message, to_message
from eggroll.distributed.local import LocalPool
from eggroll.distributed.state import digest, pack, unpack
from eggroll.errors import ConfigError, MemoryBudgetError, RewardError, RunError
from eggroll.loop import Loop

SIZE = 32


def run(pool, settings, start=0, generations=None):
    settings = settings if generations is None else type(settings)(**settings.to_dict() | {"generations": generations})
    return Loop(settings, pool).go(start)


def theta(pool):
    return pool.state_tensors()["parameter/theta"].numpy().copy()


def thetas(pool):
    """The weights of all workers, once each has taken all updates that it was sent."""
    processes = pool._transport._processes
    for process in processes:
        while process.queue:
            process.work()
    return [process.host.worker.theta for process in processes]


@pytest.fixture
def alone(toys):
    """What one worker without a fault ends with."""
    with LocalPool(toys.NumpyWorker, population_size=SIZE) as pool:
        run(pool, toys.config())
        return theta(pool)


def make(toys, factory=None, **settings):
    return LocalPool(factory or toys.NumpyWorker, **{"population_size": SIZE, "workers": 3, **settings})


def test_public_names():
    assert dir(distributed) == ["LocalPool", "RayPool", "TorchWorker", "Worker", "evolve"]
    assert callable(distributed.evolve)
    with pytest.raises(AttributeError, match="has no attribute 'Pool'"):
        _ = distributed.Pool


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_do_not_depend_on_the_number_of_workers(toys, alone, workers):
    with make(toys, workers=workers) as pool:
        run(pool, toys.config())
        assert np.array_equal(theta(pool), alone)
    assert np.abs(alone - toys.NumpyWorker().target).max() < 1, "it learns"


def test_one_evaluation_of_all_ranges(toys):
    with make(toys, range_size=8) as pool:
        found = pool.evaluate(0, 0.1, range(SIZE))
        whole = toys.NumpyWorker().evaluate(0, 0.1, range(SIZE))
        assert np.array_equal(found.fitness, whole.fitness)
        assert found.tokens == SIZE
        assert found.samples == [{"member": 0}]
        assert found.metrics["share"] == (0 + 8 + 16 + 24) / 4, "a mean over members"
        assert found.metrics["draw_s"] == 1.0, "seconds are those of the worker that spent most: two of four ranges"
        assert (found.metrics["workers"], found.metrics["ranges_repeated"]) == (3, 0)


def test_heldout_is_the_leads(toys):
    with make(toys) as pool:
        found = pool.heldout(0)
        assert found.reward == toys.NumpyWorker().heldout(0).reward
        assert (found.samples, found.metrics) == ([{"centre": True}], {"more": 1.0})


@pytest.mark.parametrize("victims", [[0], [1, 2], [0, 1, 2]])
def test_dead_workers_are_replaced_and_results_stay(toys, alone, victims):
    settings = toys.config()
    with make(toys) as pool:
        run(pool, settings, generations=4)
        for number in [pool.workers()[victim]["number"] for victim in victims]:
            pool.kill(number)
        with pytest.warns(WorkerWarning, match=r"worker \d .* is gone .*; its members are scored by others"):
            run(pool, settings, start=4)
        assert np.array_equal(theta(pool), alone)
        assert len(pool.workers()) == 3


def test_a_checkpoint_is_where_a_new_worker_starts(toys, alone):
    settings, applied = toys.config(), []

    class Counting(toys.NumpyWorker):
        def apply(self, record):
            applied.append(record.generation)
            return super().apply(record)

    with make(toys, Counting, workers=1) as pool:
        run(pool, settings, generations=6)
        pool.state_tensors()
        run(pool, settings, start=6, generations=8)
        applied.clear()
        pool.add_worker()
        pool.wait_until_ready(2)
        assert applied == [6, 7]
        run(pool, settings, start=8)
        pool.kill(pool.workers()[0]["number"])
        with pytest.warns(WorkerWarning):
            pool.evaluate(10, 0.1)  # the new one leads now
        assert np.array_equal(theta(pool), alone)


def test_a_worker_that_lacks_much_gets_a_copy_of_the_lead(toys, monkeypatch):
    monkeypatch.setattr("eggroll.distributed.crew.REPLAYED", 3)
    settings, applied = toys.config(), []

    class Counting(toys.NumpyWorker):
        def apply(self, record):
            applied.append(record.generation)
            return super().apply(record)

    with make(toys, Counting, workers=1) as pool:
        run(pool, settings)
        applied.clear()
        pool.add_worker()
        pool.wait_until_ready(2)
        assert applied == []
        states = thetas(pool)
        assert np.array_equal(*states)


def test_a_lost_checkpoint_is_replaced_by_the_leads_state_or_by_all_records(toys, alone):
    settings = toys.config()
    with make(toys, workers=2) as pool:
        run(pool, settings, generations=5)
        pool.state_tensors()  # worker 0's
        held = pool._crew.history.base
        held._value, held._error = None, distributed.local.WorkerLostError("its machine is gone")
        pool.add_worker()
        pool.wait_until_ready(3)
        first, *_, last = thetas(pool)
        assert np.array_equal(first, last)

        pool.state_tensors()
        held = pool._crew.history.base
        held._value, held._error = None, distributed.local.WorkerLostError("its machine is gone")
        for one in pool.workers():
            pool.kill(one["number"])
        with pytest.warns(WorkerWarning):
            run(pool, settings, start=5)
        assert np.array_equal(theta(pool), alone)


def test_loading_a_state_brings_everyone_to_it(toys, alone):
    settings = toys.config()
    with make(toys) as source, make(toys) as pool:
        run(source, settings, generations=5)
        run(pool, settings, generations=2)
        pool.load_state_tensors(source.state_tensors())
        pool.add_worker()
        pool.wait_until_ready(4)
        run(pool, settings, start=5)
        states = thetas(pool)
        assert len(states) == 4
        assert all(np.array_equal(state, alone) for state in states)


@pytest.mark.parametrize("check_every", [1, 3])
def test_different_weights_are_noticed_and_mended(toys, alone, tmp_path, check_every):
    settings = toys.config()
    with make(toys, lambda: toys.NumpyWorker(tamper=(tmp_path / "m", 2)), check_every=check_every) as pool:
        with pytest.warns(
            DigestWarning, match=r"after 3 updates the weights of worker 1 .*, worker 2 .* were not those"
        ):
            run(pool, settings)
        states = thetas(pool)
        assert all(np.array_equal(state, alone) for state in states)


def test_without_comparisons_nothing_is_noticed(toys, tmp_path):
    with make(toys, lambda: toys.NumpyWorker(tamper=(tmp_path / "m", 2)), check_every=0) as pool:
        run(pool, toys.config())
        states = thetas(pool)
        assert not np.array_equal(states[0], states[1])


def test_errors_of_a_worker_are_raised_as_they_are(toys):
    with make(toys, toys.Wrong) as pool, pytest.raises(RewardError, match=r"^the reward is wrong$"):
        pool.evaluate(0, 0.1, range(SIZE))
    with make(toys, toys.Buggy) as pool, pytest.raises(KeyError, match="nothing"):
        pool.evaluate(0, 0.1, range(SIZE))
    with (
        make(toys, toys.Miscounting) as pool,
        pytest.raises(RewardError, match=r"must return \(2,\) or \(2, prompts\)"),
    ):
        pool.evaluate(0, 0.1, range(SIZE))


def test_a_pool_is_usable_after_an_error(toys):
    class Once(toys.NumpyWorker):
        failed = False

        def evaluate(self, generation, sigma, members):
            if not Once.failed and members.start == 4:
                Once.failed = True
                raise RewardError("only once")
            return super().evaluate(generation, sigma, members)

    with make(toys, Once) as pool:
        with pytest.raises(RewardError):
            pool.evaluate(0, 0.1, range(SIZE))
        expected = toys.NumpyWorker().evaluate(0, 0.1, range(SIZE)).fitness
        assert np.array_equal(pool.evaluate(0, 0.1, range(SIZE)).fitness, expected)


def test_different_numbers_of_prompts_are_refused(toys):
    class Uneven(toys.NumpyWorker):
        def evaluate(self, generation, sigma, members):
            found = super().evaluate(generation, sigma, members)
            return type(found)(np.stack([found.fitness] * (2 + (members.start > 6)), axis=1))

    with make(toys, Uneven) as pool, pytest.raises(RewardError, match="must be scored on the same prompts"):
        pool.evaluate(0, 0.1, range(SIZE))


def test_no_room_for_some_is_a_warning_and_for_all_an_error(toys, tmp_path):
    told = []
    with make(toys, toys.once_without_room(tmp_path / "m"), notify=told.append) as pool:
        pool.wait_until_ready(2)
        assert [one["number"] for one in pool.workers()] == [1, 2]
        assert told[0].startswith("worker 0 is left out: the model needs 14 GB, 2 GB are free (on node ")
    with pytest.warns(WorkerWarning), pytest.raises(MemoryBudgetError, match=r"2 GB are free \(on node "):
        make(toys, toys.without_room)


def test_more_workers_than_ranges_are_told(toys):
    told = []
    with make(toys, workers=3, population_size=4, notify=told.append):
        assert told == [
            "3 workers share 2 ranges of 2 members, so some are idle; a smaller range_size or a larger population_size "
            "gives all of them work"
        ]


def test_settings_that_cannot_work_are_told_all_at_once(toys):
    with pytest.raises(ConfigError) as caught:
        make(toys, workers=0, check_every=-1)
    assert "workers (=0) must be a whole number of at least 1" in str(caught.value)
    assert "check_every (=-1) must be a whole number of at least 0" in str(caught.value)


def test_a_pool_without_workers_says_so(toys):
    with make(toys, workers=1) as pool:
        pool._crew.clear()
        with pytest.raises(RunError, match=r"the pool has no workers; add_worker\(\) adds one"):
            pool.evaluate(0, 0.1, range(SIZE))


def test_records_travel_without_loss():
    weights = np.random.default_rng(0).normal(size=100).astype(np.float32)
    record = UpdateRecord.make(3, 0.1, 0.2, weights)
    assert from_message(to_message(record)) == record


def test_states_travel_without_loss():
    tensors = {
        "parameter/a": torch.randn(3, 4, dtype=torch.bfloat16),
        "parameter/b": torch.arange(4.0)[::2],
        "optimizer/a/step": torch.tensor(3.0),
        "parameter/n": np.arange(6, dtype=np.int16).reshape(2, 3).T,
    }
    found = unpack(pack(tensors))
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(tensors[name])) for name in tensors)
    assert [str(found[name].dtype) for name in found] == ["torch.bfloat16", "torch.float32", "torch.float32", "int16"]
    changed = found | {"optimizer/a/step": torch.tensor(4.0)}
    assert digest(found) == digest(tensors) == digest(changed)
    found["parameter/a"] = found["parameter/a"].clone()
    found["parameter/a"].view(torch.int16)[0, 0] ^= 1
    assert digest(found) != digest(tensors), "one bit is enough"


def test_a_host_takes_each_record_once_and_in_order(toys):
    host = Host(lambda state: state)
    host.build(toys.NumpyWorker)
    message = to_message(UpdateRecord.make(0, 0.1, 0.2, np.arange(4, dtype=np.float32)))
    norm = host.apply(0, message)
    once = host.worker.theta.copy()
    assert host.apply(0, message) == norm
    assert np.array_equal(host.worker.theta, once)
    with pytest.raises(OutOfStepError, match="record 2 came to a worker that has taken 1"):
        host.apply(2, message)


def test_where_a_reward_raised_goes_along(toys, tmp_path):
    """The cause of an error, which has the lines, does not go from process to process; notes do."""
    file = tmp_path / "score.py"
    file.write_text("def score():\n    return 1 / 0\n")
    names = {}
    exec(compile(file.read_text(), str(file), "exec"), names)

    class Raising(toys.NumpyWorker):
        def evaluate(self, generation, sigma, members):
            try:
                names["score"]()
            except ZeroDivisionError as error:
                raise RewardError("the reward raised") from error

    host = Host(lambda state: state)
    host.build(Raising)
    with pytest.raises(RewardError) as raised:
        host.evaluate(0, 0.1, 0, 4)
    sent = pickle.loads(pickle.dumps(raised.value))
    assert sent.__notes__ == [f"  at {file}, line 2: return 1 / 0"]


def test_a_worker_that_never_answers_is_neither_compared_nor_asked(toys):
    with make(toys, check_every=1) as pool:
        crew = pool._crew
        pool.evaluate(0, 0.1, range(SIZE))
        stuck, sent = crew.ready()[0], []
        stuck.busy.add("a ticket that never comes back")
        real = crew.send

        def send(seat, method, *args, **more):
            sent.append((seat, method))
            return real(seat, method, *args, **more)

        crew.send = send
        pool._compare()
        assert [(seat is stuck, method) for seat, method in sent] == [(False, "digest")] * 2
        assert np.isfinite(pool.heldout(0).reward)
        assert sent[-1][0] is not stuck


def test_history():
    history = History()
    history.messages += ["a", "b", "c"]
    history.snapshot("state")
    history.messages += ["d"]
    assert (history.position, history.behind, history.start()) == (4, 1, ("state", 3, ["d"]))
    history.drop_base()
    assert history.start() == (None, 0, ["a", "b", "c", "d"])
    history.begin("loaded")
    history.messages += ["e"]
    assert (history.position, history.start()) == (5, ("loaded", 4, ["e"]))
