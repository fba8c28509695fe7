"""Trackers: metrics arrive, wrong names are explained, and a tracker that fails never ends a run."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eggroll.errors import ConfigError, MissingExtraError
from eggroll.lifecycle import RunKind, train
from eggroll.run.trackers import TrackerWarning, make_trackers


def events(run):
    accumulator = EventAccumulator(str(run.events))
    accumulator.Reload()
    return accumulator


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb that notes what it is told."""
    seen = SimpleNamespace(logged=[], options=None, finished=False)

    def init(**options):
        seen.options = options
        return SimpleNamespace(
            log=lambda values, step: seen.logged.append((step, values)),
            finish=lambda: setattr(seen, "finished", True),
        )

    module = SimpleNamespace(init=init, Table=lambda columns, data: data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_tensorboard_gets_numbers_and_texts(run):
    tracker = make_trackers("tensorboard", run)
    tracker.log(1, {"generation": 1, "fitness_mean": 0.5, "members_per_s": 3, "own": 2.0, "event": "start", "x": None})
    tracker.text(1, "sample", "a *b*\n<c>")
    tracker.close()
    found = events(run)
    assert set(found.Tags()["scalars"]) == {"fitness/mean", "speed/members_per_s", "own"}
    assert [(event.step, event.value) for event in found.Scalars("fitness/mean")] == [(1, 0.5)]
    text = found.Tensors("sample/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"    a *b*\n    <c>"


def test_a_killed_run_has_its_events_up_to_the_last_generation(run):
    tracker = make_trackers("tensorboard", run)
    tracker.log(1, {"fitness_mean": 0.5})  # never closed
    assert [event.step for event in events(run).Scalars("fitness/mean")] == [1]
    tracker.close()


def test_a_resumed_run_hides_the_events_that_it_repeats(five):
    first = make_trackers("tensorboard", five)
    for step in range(1, 6):
        first.log(step, {"fitness_mean": 1.0})
    first.close()
    time.sleep(1.01)  # files of one second are read in the order of a counter as text, 10 before 9
    five.rewind(3)
    second = make_trackers("tensorboard", five)
    second.log(4, {"fitness_mean": 2.0})
    second.close()
    values = [(event.step, event.value) for event in events(five).Scalars("fitness/mean")]
    assert values == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


@pytest.mark.parametrize("report_to", ["none", "", [], ["none"]])
def test_nothing_is_reported_nowhere(run, report_to):
    tracker = make_trackers(report_to, run)
    tracker.log(1, {"fitness_mean": 0.5})
    tracker.close()
    assert not run.events.exists()


def test_a_wrong_name_is_explained(run):
    with pytest.raises(ConfigError) as caught:
        make_trackers("none,tensorbord", run)
    assert str(caught.value) == (
        "report_to (='tensorbord') must be one or several of: tensorboard, wandb, trackio, none; "
        "did you mean 'tensorboard'?"
    )
    assert not run.events.exists()


def test_wandb_missing_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"--report-to wandb needs 'wandb'.*pip install wandb; or go without"):
        make_trackers("wandb", run)


def test_tensorboard_does_without_torch(run, monkeypatch):
    """The extra for reinforcement learning has none."""
    for name in [name for name in sys.modules if name == "torch" or name.startswith("torch.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch", None)
    tracker = make_trackers("tensorboard", run)
    tracker.log(1, {"fitness_mean": 0.25})
    tracker.close()
    assert [event.value for event in events(run).Scalars("fitness/mean")] == [0.25]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_what_is_missing_is_said_before_a_run_is_made(name, tmp_path, monkeypatch):
    """An empty run directory would be in the way of the next try."""
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    loaded = []
    kind = RunKind(name="toy", options=None, plan=loaded.append, base=None, save=None)
    with pytest.raises(MissingExtraError, match=f"pip install {name}; or go without it: --report-to none"):
        train(kind, SimpleNamespace(report_to=f"none,{name}", output=tmp_path / "run", resume=None))
    assert loaded == []
    assert list(tmp_path.iterdir()) == []


def test_one_that_cannot_start_is_dropped_too(run, monkeypatch):
    def init(**options):
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.warns(TrackerWarning, match=r"wandb failed \(RuntimeError: api_key not configured\)"):
        tracker = make_trackers("wandb,tensorboard", run)
    tracker.log(1, {"fitness_mean": 1.0})
    tracker.close()
    assert [event.step for event in events(run).Scalars("fitness/mean")] == [1]


def test_wandb_and_tensorboard_together(run, wandb):
    tracker = make_trackers("tensorboard, wandb", run)
    tracker.log(2, {"generation": 2, "heldout_reward": 0.5})
    tracker.text(2, "sample", "hi")
    tracker.close()
    assert wandb.options["config"] == run.config
    assert wandb.options["id"] == run.environment["run_id"]
    assert wandb.logged == [(2, {"reward/heldout": 0.5}), (2, {"sample": [[2, "hi"]]})]
    assert wandb.finished
    assert events(run).Tags()["scalars"] == ["reward/heldout"]


def test_trackio_gets_numbers_texts_and_the_same_name_after_a_resume(run, monkeypatch):
    """Against a stand-in; ``make test-extras`` runs the real one."""
    seen = SimpleNamespace(logged=[], options=[], finished=0)

    def init(**options):
        seen.options.append(options)
        return SimpleNamespace(
            log=lambda values, step: seen.logged.append((step, values)),
            finish=lambda: setattr(seen, "finished", seen.finished + 1),
        )

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, Markdown=str))
    for step in (1, 2):
        tracker = make_trackers("trackio", run)
        tracker.log(step, {"generation": step, "heldout_reward": 0.5})
        tracker.close()
    tracker = make_trackers("trackio", run)
    tracker.text(3, "sample", "hi")
    assert seen.logged == [
        (1, {"reward/heldout": 0.5}),
        (2, {"reward/heldout": 0.5}),
        (3, {"sample": "```text\nhi\n```"}),
    ]
    assert len({options["name"] for options in seen.options}) == 1
    assert seen.options[0]["name"] == f"{run.path.name}-{run.run_id[:8]}"
    assert {options["resume"] for options in seen.options} == {"allow"}
    assert seen.options[0]["config"] == run.config
    assert seen.finished == 2


def test_one_that_fails_is_dropped_with_a_warning_and_the_others_go_on(run, wandb, monkeypatch):
    tracker = make_trackers(["wandb", "tensorboard"], run)

    class Broken(list):
        def append(self, item):
            raise ConnectionError("no route")

    wandb.logged = Broken()
    with pytest.warns(TrackerWarning, match=r"wandb failed \(ConnectionError: no route\) and gets no more metrics"):
        tracker.log(1, {"fitness_mean": 1.0})
    tracker.log(2, {"fitness_mean": 2.0})
    tracker.close()
    assert [event.step for event in events(run).Scalars("fitness/mean")] == [1, 2]
