"""Which weights a run leaves, and when patience ends it."""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from test_run import toys

from eggroll import lifecycle
from eggroll.core.settings import setting
from eggroll.errors import ConfigError
from eggroll.loop import Heldout
from eggroll.run.keeping import Kept, Standing, check_keep, check_patience, kept_sentence
from eggroll.run.run_dir import RunDir

SCORES = (0.2, 0.5, 0.8, 0.8, 0.3, 0.4, 0.1)
"""Held-out scores of the center before training and after 1 to 6 generations: the best is that of generation 2."""


@dataclass(frozen=True, kw_only=True)
class Options(toys.ToyOptions):
    scores: tuple[float, ...] = SCORES
    keep: str = setting("best", resume=True, absent="last")
    generations: int = setting(6, resume=True)
    every: int = 100


class Scored(toys.Toy):
    def heldout(self, generation):
        return Heldout(self.options.scores[generation])


def _plan(options: Any) -> Any:
    plan = toys._plan(options)
    return dataclasses.replace(plan, make_worker=lambda: Scored(options), checkpoint_every=options.every)


KIND = dataclasses.replace(toys.KIND, options=Options, plan=_plan, base=lambda options, run: Scored(options))


def train(**options):
    with toys.quick():
        return lifecycle.train(KIND, Options(**options))


def resume(path, **changes):
    with toys.quick():
        return lifecycle.train(KIND, dataclasses.replace(lifecycle.resumed_options(KIND, path), **changes))


def weights_of(run, generation):
    return lifecycle.rebuild(KIND, run, to=generation)[0].weights


def held(run):
    return sorted(int(path.name.split("-")[1]) for path in run.checkpoints.iterdir())


@pytest.mark.parametrize(
    ("scores", "best", "last", "waited"),
    [
        ([], None, None, 0),
        ([(0, 0.5)], None, None, 0),
        ([(0, 0.5), (10, 0.4)], (10, 0.4), (10, 0.4), 1),
        ([(0, 0.5), (10, 0.6), (20, 0.6)], (10, 0.6), (20, 0.6), 1),
        ([(0, 0.9), (10, 0.4), (20, 0.6), (30, 0.5)], (20, 0.6), (30, 0.5), 3),
    ],
)
def test_standing(scores, best, last, waited):
    lines = [{"generation": generation, "heldout_reward": score} for generation, score in scores]
    found = Standing.of([*lines, {"generation": 31, "heldout_reward": None}, {"generation": 32}])
    assert (found.best, found.last, len(found.waited)) == (best, last, waited)
    assert found.is_over(waited) == (waited > 0)
    assert not found.is_over(waited + 1)
    assert not found.is_over(0)


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        (
            Kept("best", 30, 50, Standing([(0, 0.5), (30, 0.81), (50, 0.79)])),
            "best 0.8100 at generation 30, last 0.7900 at 50; saved: best",
        ),
        (
            Kept("last", 50, 50, Standing([(30, 0.81), (50, 0.79)])),
            "best 0.8100 at generation 30, last 0.7900 at 50; saved: last",
        ),
        (
            Kept("best", 50, 50, Standing([(30, 0.7), (50, 0.79)])),
            "best and last 0.7900 at generation 50; saved: best",
        ),
        (
            Kept("best", 30, 53, Standing([(30, 0.81), (50, 0.79)])),
            "best 0.8100 at generation 30, last 0.7900 at 50, and generation 53 has no score; saved: best",
        ),
        (Kept("last", 9, 9, Standing([(0, 0.5)])), ""),
    ],
)
def test_sentences(kept, text):
    assert kept.sentence() == text
    lines = [{"generation": generation, "heldout_reward": score} for generation, score in kept.standing.scores]
    assert kept_sentence(kept.result(), lines) == text


def test_the_best_generation_is_left(tmp_path):
    done = train(output=str(tmp_path / "run"))
    run = done.run
    assert (done.kept.saved, done.kept.generation, done.generation) == ("best", 2, 6)
    assert np.array_equal(done.worker.weights, weights_of(run, 2))
    assert not np.array_equal(done.worker.weights, weights_of(run, 6))
    assert held(run) == [2, 6]
    assert json.loads((run.path / "result.json").read_text()) == {
        "generations": 6, "saved": "best", "saved_generation": 2, "best_heldout_reward": 0.8, "best_generation": 2,
        "last_heldout_reward": 0.1, "last_generation": 6,
    }  # fmt: skip


def test_the_best_checkpoint_outlives_later_ones(tmp_path, monkeypatch):
    done = train(output=str(tmp_path / "run"), every=1)
    assert held(done.run) == [2, 5, 6]
    monkeypatch.setattr("eggroll.run.disk.LARGE", 0)
    assert held(train(output=str(tmp_path / "thin"), every=1).run) == [2, 6]


def test_the_last_generation_is_left_where_that_is_wanted(tmp_path):
    done = train(output=str(tmp_path / "run"), keep="last")
    assert np.array_equal(done.worker.weights, weights_of(done.run, 6))
    assert held(done.run) == [6]
    assert done.result["saved_generation"] == 6
    assert done.result["best_generation"] == 2


def test_a_resumed_run_goes_on_from_the_last_and_knows_the_best(tmp_path):
    whole = train(output=str(tmp_path / "whole"))
    train(output=str(tmp_path / "run"), generations=4)
    done = resume(tmp_path / "run", generations=6)
    assert done.kept == whole.kept
    assert done.result == whole.result
    assert np.array_equal(done.worker.weights, whole.worker.weights)
    assert (tmp_path / "run" / "updates.jsonl").read_bytes() == (tmp_path / "whole" / "updates.jsonl").read_bytes()
    assert np.array_equal(weights_of(done.run, 6), weights_of(whole.run, 6))


def test_a_kill_between_a_score_and_its_checkpoint(tmp_path):
    """Generation 2 is logged as the best and has no checkpoint: the resumed run makes it."""
    train(output=str(tmp_path / "run"), generations=2, keep="last")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    done = resume(tmp_path / "run", generations=6, keep="best")
    assert np.array_equal(done.worker.weights, weights_of(done.run, 2))


def test_a_best_generation_without_checkpoint_is_said(tmp_path):
    train(output=str(tmp_path / "run"), keep="last", generations=5)
    with pytest.warns(UserWarning, match=r"(?s)best generation, 2, are not in a checkpoint.* replay .* --to 2"):
        done = resume(tmp_path / "run", keep="best", generations=6)
    assert done.kept.saved == "last"
    assert np.array_equal(done.worker.weights, weights_of(done.run, 6))


def test_runs_from_before_there_was_a_choice_keep_the_last(tmp_path):
    train(output=str(tmp_path / "run"), generations=3, keep="last")
    run = RunDir.open(tmp_path / "run")
    options = {key: value for key, value in run.config["options"].items() if key not in ("keep", "patience")}
    run.update_config({**run.config, "options": options})
    found = lifecycle.resumed_options(KIND, run.path)
    assert (found.keep, found.patience) == ("last", 0)


def test_patience(tmp_path):
    said = "stopped early after generation 5: 3 evaluations in a row (0.8000, 0.3000, 0.4000) did not beat the best "
    with pytest.warns(UserWarning, match=re.escape(f"{said}score, that of generation 2 (0.8000)")):
        done = train(output=str(tmp_path / "run"), patience=3)
    assert (done.generation, done.interrupted) == (5, False)
    assert done.result["stopped_early"] is True
    assert done.result["generations"] == 5
    assert len(done.run.updates()) == 5


def test_a_larger_patience_goes_on(tmp_path):
    whole = train(output=str(tmp_path / "whole"))
    with pytest.warns(UserWarning, match="stopped early"):
        train(output=str(tmp_path / "run"), patience=2)
    with pytest.warns(UserWarning, match="stopped early after generation 4"):
        assert resume(tmp_path / "run").generation == 4  # with the same patience there is nothing to do
    done = resume(tmp_path / "run", patience=5)
    assert done.generation == 6
    assert done.result == whole.result
    assert (tmp_path / "run" / "updates.jsonl").read_bytes() == (tmp_path / "whole" / "updates.jsonl").read_bytes()


def test_patience_counts_from_the_start():
    standing = Standing([(0, 0.9), (10, 0.2), (20, 0.3)])
    assert standing.why_over() == (
        "stopped early after generation 20: 2 evaluations in a row (0.2000, 0.3000) did not beat the score from before "
        "training (0.9000)"
    )


@pytest.mark.parametrize(
    ("patience", "heldout", "every", "text"),
    [
        (-1, True, 1, r"patience \(=-1\) must be a whole number of at least 0"),
        (1.5, True, 1, r"patience \(=1.5\) must be a whole number"),
        (3, False, 1, r"patience \(=3\) counts evaluations on held-out data, and there are no held-out data"),
        (3, True, 0, r"and eval_every is 0"),
    ],
)
def test_a_patience_that_counts_nothing(patience, heldout, every, text):
    with pytest.raises(ConfigError, match=text):
        check_patience(patience, heldout=heldout, eval_every=every)


@pytest.mark.parametrize(
    ("keep", "heldout", "text"),
    [
        ("first", True, r"keep \(='first'\) must be one of: best, last"),
        ("best", False, "there are none: give eval_data"),
        ("best", True, r"needs a run directory: give run=RunDir.create"),
    ],
)
def test_what_keeping_the_best_needs(keep, heldout, text):
    with pytest.raises(ConfigError, match=text):
        check_keep(keep, heldout=heldout, run=None)
