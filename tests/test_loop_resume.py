"""What a resumed loop goes back to, and sums that travel with updates."""

import shutil

import numpy as np
import pytest
from test_loop import Counter, make, scores

from eggroll.loop import Evaluation
from eggroll.run.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "run", {})


def test_totals_reach_the_update_and_are_counted(run):
    """Numbers are logged as counts of the whole run, arrays only go to the worker; a resumed run counts on."""
    seen = []

    def counted(generation, sigma):
        return Evaluation(scores(generation), totals={"steps": 3, "sums": np.arange(2.0) + generation})

    worker = Counter(evaluate=counted)
    apply = worker.apply
    worker.apply = lambda record: seen.append(dict(record.totals)) or apply(record)
    loop = make(run, generations=2, worker=worker)
    assert [line["steps"] for line in loop.go()] == [3.0, 6.0]
    assert [(one["steps"], one["sums"].tolist()) for one in seen] == [(3, [0.0, 1.0]), (3, [1.0, 2.0])]
    assert all("sums" not in line for line in run.metrics())
    assert "totals" not in run.path.joinpath("updates.jsonl").read_text()
    again = make(run, generations=3, worker=Counter(evaluate=counted))
    assert [line["steps"] for line in again.go(again.resume())] == [3.0, 6.0, 9.0]


def test_going_back_to_the_checkpoint(run):
    """Without what the log does not hold, generations after the newest checkpoint are evaluated again."""
    make(run, generations=5, checkpoint_every=2).go()
    run.rewind(5)
    again = make(run, generations=5)
    remove = run.checkpoints / "generation-000005"
    assert remove.exists()
    shutil.rmtree(remove)
    assert again.resume(from_checkpoint=True) == 4
    assert len(run.updates()) == 4
