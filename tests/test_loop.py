"""The generation loop with a worker that only counts: order, ends, interrupts, resume."""

import os
import signal
import threading

import numpy as np
import pytest
import torch

from eggroll.core.config import ESConfig
from eggroll.core.fitness import NonFiniteFitnessWarning
from eggroll.core.records import UpdateRecord
from eggroll.errors import RewardError, RunWriteError
from eggroll.loop import Evaluation, Heldout, Loop, NoSpreadWarning, fitness_metrics, has_spread
from eggroll.run.run_dir import RunDir

SIZE = 4


def scores(generation):
    return np.random.default_rng(generation).normal(size=(SIZE, 2))


def evaluate(generation, sigma):
    samples = [{"member": 0, "completion": str(generation)}]
    return Evaluation(scores(generation), {"draw_s": 0.0}, tokens=10, samples=samples)


class Counter:
    """A worker whose state depends on every record and on their order."""

    def __init__(self, events=None, *, evaluate=evaluate, heldout=None):
        self.state = torch.zeros(1, dtype=torch.float64)
        self.events = [] if events is None else events
        self.during = None
        self.score, self.score_center = evaluate, heldout

    def evaluate(self, generation, sigma, members):
        assert members == range(SIZE)
        return self.score(generation, sigma)

    def heldout(self, generation):
        return self.score_center()

    def apply(self, record):
        if self.during is not None:
            self.during(record.generation)
        self.state = self.state * 1.01 + float(record.weights @ np.arange(SIZE)) * record.lr
        self.events.append(("apply", record.generation))
        return abs(float(self.state))

    def state_tensors(self):
        return {"state": self.state}

    def load_state_tensors(self, tensors):
        self.state = tensors["state"].clone()


def make(run=None, generations=6, worker=None, **settings):
    config = ESConfig(population_size=SIZE, generations=generations, lr=0.1, lr_decay=0.9, sigma_decay=0.5)
    worker = worker or Counter()
    worker.score = settings.pop("evaluate", worker.score)
    worker.score_center = settings.pop("heldout", worker.score_center)
    return Loop(config, worker, run, worker.score_center is not None, **settings)


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "run", {})


@pytest.fixture
def whole(tmp_path):
    """What an uninterrupted run of 6 generations leaves."""
    run = RunDir.create(tmp_path / "whole", {})
    loop = make(run)
    loop.go()
    return run, loop.worker.state


class Listener:
    def __init__(self, events):
        self.events = events

    def generation(self, metrics):
        self.events.append(("told", metrics["generation"], metrics.get("event")))


def kill(number):
    os.kill(os.getpid(), number)


def test_the_order_of_things(run, monkeypatch):
    """Evaluate, log the record, apply it, evaluate the center, log metrics, tell, checkpoint, ask whether to stop."""
    events = []
    for name, label in (("append_update", "record"), ("append_metrics", "metrics"), ("save_checkpoint", "checkpoint")):
        real = getattr(run, name)

        def logged(*args, _real=real, _label=label, **kwargs):
            events.append((_label,))
            return _real(*args, **kwargs)

        monkeypatch.setattr(run, name, logged)
    loop = make(
        run,
        generations=2,
        worker=Counter(events),
        evaluate=lambda generation, sigma: (
            events.append(("evaluate", generation, sigma)) or evaluate(generation, sigma)
        ),
        heldout=lambda: events.append(("heldout",)) or Heldout(1.0),
        eval_every=1,
        checkpoint_every=1,
        listeners=[Listener(events)],
        stop=lambda metrics: events.append(("stop?", metrics["generation"])) and False,
    )
    loop.go()
    start = [("heldout",), ("metrics",), ("told", 0, "start")]
    first = [("evaluate", 0, 0.01), ("record",), ("apply", 0), ("heldout",), ("metrics",), ("told", 1, None)]
    first += [("checkpoint",), ("stop?", 1)]
    second = [("evaluate", 1, 0.005), ("record",), ("apply", 1), ("heldout",), ("metrics",), ("told", 2, None)]
    second += [("checkpoint",), ("stop?", 2)]
    assert events == start + first + second


def test_metrics(run):
    history = make(run, generations=2).go()
    assert history == run.metrics()
    assert [line["generation"] for line in history] == [1, 2]
    assert [line["sigma"] for line in history] == [0.01, 0.005]
    assert [line["lr"] for line in history] == pytest.approx([0.1, 0.09])
    means = scores(0).mean(axis=1)
    assert history[0]["fitness_mean"] == pytest.approx(means.mean())
    assert history[0]["fitness_max"] == pytest.approx(means.max())
    assert history[0]["fitness_min"] == pytest.approx(means.min())
    assert history[0]["fitness_std"] == pytest.approx(means.std())
    assert history[0]["invalid_scores"] == 0
    assert history[0]["update_norm"] > 0
    assert history[0]["members_per_s"] > 0
    assert history[0]["tokens_per_s"] == pytest.approx(history[0]["members_per_s"] * 10 / SIZE)
    assert 0 < history[0]["elapsed_s"] < history[1]["elapsed_s"]
    assert run.samples() == [{"generation": g + 1, "member": 0, "completion": str(g)} for g in range(2)]


@pytest.mark.parametrize(("every", "expected"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_when_the_center_is_evaluated(every, expected):
    """Before the first generation, every so often, and after the last."""
    seen = []
    loop = make(generations=5, heldout=lambda: seen.append(1) or Heldout(2.0), eval_every=every)
    history = loop.go()
    assert [line["generation"] for line in history if "heldout_reward" in line] == expected
    assert len(seen) == len(expected) + 1


def test_a_heldout_reward_that_is_no_number_is_left_out(run):
    history = make(run, generations=1, heldout=lambda: Heldout(float("nan"), [{"member": -1}])).go()
    assert "heldout_reward" not in history[0]
    assert run.samples()[0] == {"generation": 0, "member": -1}


@pytest.mark.parametrize(("every", "expected"), [(0, [6]), (2, [4, 6]), (4, [4, 6]), (5, [5, 6])])
def test_checkpoints(run, every, expected):
    """The newest two are kept, and there is always one of the end."""
    make(run, checkpoint_every=every).go()
    assert [int(path.name[-6:]) for path in sorted(run.checkpoints.iterdir())] == expected


def test_stop(run):
    loop = make(run, stop=lambda metrics: metrics["generation"] == 3)
    assert len(loop.go()) == 3
    assert not loop.interrupted
    assert loop.applied == 3
    assert run.latest_checkpoint().generation == 3


def test_a_run_that_was_over_does_nothing_when_it_goes_on(run):
    """A budget that is used up stays used up, and a run that was killed before it asked stops where it would have."""
    asked = []

    def third(metrics):
        asked.append(metrics["generation"])
        return metrics["generation"] >= 3

    make(run, generations=3).go()
    again = make(RunDir.open(run.path), stop=third)
    assert len(again.go(again.resume())) == 3
    assert asked == [3]
    assert (again.applied, again.interrupted, len(run.updates())) == (3, False, 3)
    more = make(RunDir.open(run.path), stop=lambda metrics: metrics["generation"] == 5)
    assert len(more.go(more.resume())) == 5


def test_no_generations(run):
    loop = make(run, generations=0, heldout=lambda: Heldout(1.0))
    assert loop.go() == []
    assert [line["event"] for line in run.metrics()] == ["start"]
    assert run.latest_checkpoint() is None


def test_without_a_run_directory():
    loop = make()
    assert len(loop.go()) == 6
    assert loop.resume() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["evaluate", "apply", "heldout", "listener", "stop", "checkpoint"])
def test_signals_leave_a_state_that_goes_on(run, whole, monkeypatch, where, number):
    """Whenever the signal comes: log, metrics and checkpoint agree, and the rest of the run is as it would be."""
    hits = []

    def hit(generation):
        if generation == 2 and not hits:
            hits.append(generation)
            kill(number)

    worker = Counter()
    settings = {"heldout": lambda: Heldout(1.0), "eval_every": 1, "checkpoint_every": 1}
    if where == "evaluate":
        settings["evaluate"] = lambda generation, sigma: hit(generation) or evaluate(generation, sigma)
    elif where == "apply":
        worker.during = hit
    elif where == "heldout":
        settings["heldout"] = lambda: hit(loop.applied - 1) or Heldout(1.0)
    elif where == "listener":
        listener = Listener([])
        listener.generation = lambda metrics: hit(metrics["generation"] - 1)
        settings["listeners"] = [listener]
    elif where == "stop":
        settings["stop"] = lambda metrics: bool(hit(metrics["generation"] - 1))
    else:
        real = run.save_checkpoint

        def saving(generation, *args, **kwargs):
            hit(generation - 1)
            return real(generation, *args, **kwargs)

        monkeypatch.setattr(run, "save_checkpoint", saving)
    loop = make(run, worker=worker, **settings)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    loop.go()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert hits == [2]
    assert loop.interrupted
    done = 2 if where == "evaluate" else 3
    assert loop.applied == done == len(run.updates())
    assert [line["generation"] for line in run.metrics()] == list(range(done + 1))
    checkpoint = run.latest_checkpoint()
    assert checkpoint.generation == done
    assert checkpoint.load()["state"].equal(worker.state)
    again = make(RunDir.open(run.path))
    assert again.resume() == done
    again.go(done)
    assert again.worker.state.equal(whole[1])
    assert (run.path / "updates.jsonl").read_bytes() == (whole[0].path / "updates.jsonl").read_bytes()


def test_an_interrupt_before_the_first_generation_is_done(run):
    loop = make(run, evaluate=lambda generation, sigma: kill(signal.SIGINT))
    assert loop.go() == []
    assert loop.interrupted
    assert loop.applied == 0
    assert run.latest_checkpoint() is None
    assert run.updates() == []


def test_outside_the_main_thread(run):
    """Signals only come to the main thread; elsewhere the loop installs nothing and runs."""
    loop = make(run, generations=2)
    thread = threading.Thread(target=loop.go)
    thread.start()
    thread.join()
    assert loop.applied == 2


def test_an_error_keeps_what_was_done(run, whole):
    def failing(generation, sigma):
        if generation == 3:
            raise RewardError("server gone")
        return evaluate(generation, sigma)

    with pytest.raises(RewardError, match="server gone"):
        make(run, evaluate=failing).go()
    assert len(run.updates()) == 3
    assert [line["generation"] for line in run.metrics()] == [1, 2, 3]
    assert run.latest_checkpoint().generation == 3
    loop = make(RunDir.open(run.path))
    start = loop.resume()
    assert start == 3
    assert [line["generation"] for line in loop.go(start)] == [1, 2, 3, 4, 5, 6]
    assert loop.worker.state.equal(whole[1])


def test_an_error_in_the_heldout_evaluation_keeps_the_generation(run):
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise RewardError("no")
        return Heldout(1.0)

    with pytest.raises(RewardError, match="no"):
        make(run, heldout=failing, eval_every=1).go()
    assert len(run.updates()) == 2
    assert [line["generation"] for line in run.metrics()] == [0, 1, 2]
    assert "heldout_reward" not in run.metrics()[-1]


def test_resume_after_progress_that_only_the_log_has(run, whole):
    """Killed after generation 5: the checkpoint is that of generation 2."""
    make(run, generations=2).go()
    loop = make(RunDir.open(run.path), generations=5, checkpoint_every=0)
    start = loop.resume()
    loop.run.save_checkpoint = lambda *args, **kwargs: None
    loop.go(start)
    assert RunDir.open(run.path).latest_checkpoint().generation == 2
    again = make(RunDir.open(run.path))
    assert again.resume() == 5
    assert [event for event in again.worker.events if event[0] == "apply"] == [("apply", g) for g in (2, 3, 4)]
    again.go(5)
    assert again.worker.state.equal(whole[1])


def test_resume_without_any_checkpoint(run, whole):
    loop = make(run, generations=4)
    loop.run.save_checkpoint = lambda *args, **kwargs: None
    loop.go()
    again = make(RunDir.open(run.path))
    assert again.resume() == 4
    again.go(4)
    assert again.worker.state.equal(whole[1])


def test_resume_between_a_record_and_its_metrics(run, whole):
    """The generation is done again, so that the metrics have no hole."""
    loop = make(run, generations=3)
    loop.run.save_checkpoint = lambda *args, **kwargs: None
    loop.go()
    other = scores(3)
    run.append_samples([{"generation": 4, "member": 0}])
    run.append_update(UpdateRecord.make(3, 0.01, 0.1, other[:, 0].astype(np.float32)))
    again = make(RunDir.open(run.path))
    assert again.resume() == 3
    again.go(3)
    assert again.worker.state.equal(whole[1])
    assert [line["generation"] for line in again.run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert (run.path / "samples.jsonl").read_bytes() == (whole[0].path / "samples.jsonl").read_bytes()


def test_a_log_that_cannot_be_written_changes_nothing(run):
    """The record comes first: where it cannot be written, the weights stay."""
    worker = Counter()

    def full(record):
        raise RunWriteError("the disk is full")

    run.append_update = full
    with pytest.raises(RunWriteError, match="the disk is full"):
        make(run, worker=worker).go()
    assert worker.events == []
    assert float(worker.state) == 0.0


@pytest.mark.filterwarnings("default::eggroll.core.fitness.NonFiniteFitnessWarning")
def test_scores_that_are_no_numbers(run):
    def broken(generation, sigma):
        table = scores(generation)
        table[1, 0] = np.nan
        table[2] = np.inf
        return Evaluation(table)

    with pytest.warns(NonFiniteFitnessWarning, match="3 of 8 scores were NaN or infinite; they count as the worst"):
        history = make(run, generations=1, evaluate=broken).go()
    assert history[0]["invalid_scores"] == 3
    table = scores(0)
    means = [table[0].mean(), table[1, 1], table[3].mean()]
    assert history[0]["fitness_mean"] == pytest.approx(np.mean(means))
    assert history[0]["fitness_max"] == pytest.approx(np.max(means))
    worst = np.argmin(run.updates()[0].weights)
    assert worst == 2


def test_fitness_metrics_without_any_number():
    assert fitness_metrics(np.full((4, 2), np.nan)) == {"invalid_scores": 8}
    assert fitness_metrics(np.array([1.0, 2.0, np.nan]))["fitness_mean"] == 1.5


class Told:
    def __init__(self):
        self.texts = []

    def generation(self, metrics):
        pass

    def message(self, text):
        self.texts.append(text)


def flat_in(*generations):
    """Scores without any difference between members in these generations; between prompts there is one."""

    def evaluated(generation, sigma):
        table = scores(generation)
        return Evaluation(np.broadcast_to(table[:1], table.shape) if generation in generations else table)

    return evaluated


def test_generations_without_spread_are_said_and_counted(run):
    told = Told()
    make(run, generations=5, evaluate=flat_in(1, 2, 4), listeners=[told]).go()
    first, last = told.texts
    assert first == (
        "generation 2 has no spread: all 4 members scored the same, so there is nothing to learn from it. Unless this "
        "is the best score there is, try a score with more steps in between, or a larger sigma"
    )
    assert last.startswith(
        "3 of 5 generations had no spread: all their members scored the same, so nothing was learned from them. Unless"
    )
    again, told = make(RunDir.open(run.path), generations=7, evaluate=flat_in(5)), Told()
    again.listeners = [told]
    again.go(again.resume())
    assert [text.split(":")[0] for text in told.texts] == [
        "generation 6 has no spread",
        "4 of 7 generations had no spread",
    ]
    again, told = make(RunDir.open(run.path), generations=8), Told()
    again.listeners = [told]
    again.go(again.resume())
    assert told.texts == []


def test_without_a_listener_that_takes_messages_no_spread_is_a_warning():
    with pytest.warns(NoSpreadWarning) as warned:
        make(evaluate=flat_in(*range(6)), spread_advice="something else", listeners=[Listener([])]).go()
    assert len(warned) == 2
    assert str(warned[0].message).endswith("try something else")
    assert str(warned[1].message).startswith("6 of 6 generations had no spread")


def test_scores_that_differ_only_between_pairs_teach_nothing():
    told = Told()

    def evaluated(generation, sigma):
        return Evaluation(np.array([1.0, 1.0, 2.0, 2.0]))

    make(evaluate=evaluated, generations=1, listeners=[told]).go()
    assert "the scores differ, but not where they count" in told.texts[0]


@pytest.mark.parametrize(
    ("weights", "settings", "expected"),
    [
        ([0.5, 0.5, -0.5, -0.5], {}, False),
        ([0.5, -0.5, 0.5, -0.5], {}, True),
        ([1.0, 1.0, 1.0, 1.0], {"sampling": "one_sided"}, False),
        ([0.0, 0.0, 0.0, 0.1], {"sampling": "one_sided"}, True),
        ([1.0, 1.0], {}, True),  # one weight for each of two pairs
        ([0.0, 0.0], {}, False),
    ],
)
def test_has_spread(weights, settings, expected):
    assert has_spread(ESConfig(population_size=4, **settings), np.array(weights)) is expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [([np.nan] * 4, "None or NaN"), ([np.inf, -np.inf] * 2, "inf and -inf"), ([[np.nan, -np.inf]] * 4, "NaN and -inf")],
)
def test_a_generation_without_any_valid_score_ends_the_run(run, whole, value, shown):
    def broken(generation, sigma):
        return Evaluation(np.array(value)) if generation == 3 else evaluate(generation, sigma)

    with pytest.raises(RewardError, match=r"generation 4: not one of its \d scores is a number; .*" + shown):
        make(run, evaluate=broken).go()
    assert len(run.updates()) == 3
    again = make(RunDir.open(run.path))
    again.go(again.resume())
    assert again.worker.state.equal(whole[1])
