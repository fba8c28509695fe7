"""``eggroll tune`` with nothing but a model, a reward and prompts: what it chooses, prints and keeps."""

import json
import re

import pytest

from eggroll.core.settings import flag_of
from eggroll.llm.choosing.budget import Amount

NAMES = ("sigma", "lr", "lr_schedule", "generations", "population_size", "prompts_per_generation")
BARE = ["tune", "tiny", "-r", "good.py", "-d", "prompts.txt", "--max-tokens", "4", "--report-to", "none"]


def settings(folder):
    options = json.loads((folder / "config.json").read_text())["options"]
    return {name: options[name] for name in NAMES}


def chosen(folder):
    return json.loads((folder / "environment.json").read_text())["chosen"]


@pytest.fixture
def bare(eggroll):
    """``bare(...)`` is a run of the tiny model on a reward that tells its text from broken text."""
    (eggroll.work / "good.py").write_text("def score(text):\n    return sum(ord(c) % 2 for c in text) / 8\n")
    return lambda *more: eggroll(*BARE, *more)


def test_what_is_chosen_is_printed_and_kept(eggroll, bare):
    done = bare("-g", "2", "-o", "run")
    assert done.status == 0, done.err
    found, record = settings(eggroll.work / "run"), chosen(eggroll.work / "run")
    assert (found["population_size"], found["prompts_per_generation"]) == (32, 8)
    assert (found["generations"], found["lr_schedule"]) == (2, "linear")
    assert found["sigma"] == record["sigma"] == min(record["levels"], key=lambda one: one["sigma"])["sigma"]
    assert record["members"] == 16
    assert re.search(
        r"^choosing settings: .*\n  the model as it is: mean score [\d.]+ on \d+ prompts \(\d+s\)$", done.out, re.M
    )
    assert [line for line in done.out.splitlines() if line.startswith("chosen: ")] == [
        f"chosen: {line}" for line in record["lines"]
    ]
    assert record["lines"][0].startswith(f"sigma {found['sigma']:g} (of ")
    assert record["lines"][1].startswith(f"lr {found['lr']:g}, linear (first steps of up to 0.5 sigma per entry")
    assert f"sigma {found['sigma']:g}, lr {found['lr']:g}, sgd, seed 42" in done.out
    update = json.loads((eggroll.work / "run" / "updates.jsonl").read_text().splitlines()[0])
    assert (update["sigma"], update["lr"]) == (pytest.approx(found["sigma"]), pytest.approx(found["lr"]))


def test_resume_and_replay_use_what_was_chosen(eggroll, bare):
    assert bare("-g", "3", "-o", "whole").status == 0
    assert bare("-g", "3", "-o", "part").status == 0
    numbers = settings(eggroll.work / "part")
    done = eggroll("tune", "--resume", "part")
    assert done.status == 0, done.err
    assert "choosing settings" not in done.out
    assert settings(eggroll.work / "part") == numbers == settings(eggroll.work / "whole")
    done = eggroll("tune", "--config", "part/config.json", "-o", "again", "-r", "good.py")
    assert done.status == 0, done.err
    assert "choosing settings" not in done.out
    logs = [(eggroll.work / name / "updates.jsonl").read_text() for name in ("whole", "part", "again")]
    assert logs[0] == logs[1] == logs[2]
    assert eggroll("replay", "part", "--to", "2").status == 0


def test_a_resumed_run_chooses_nothing(eggroll, bare):
    assert bare("-g", "1", "-o", "run").status == 0
    done = eggroll("tune", "--resume", "run", "--sigma", "auto")
    assert done.status == 1
    assert "--sigma auto chooses for a new run, and the run in run has its settings; leave it out" in done.err


def test_what_was_given_is_not_changed(eggroll, bare):
    done = bare("--sigma", "0.03", "--lr", "0.1", "-p", "6", "--batch-size", "3", "-g", "2", "-o", "run")
    assert done.status == 0, done.err
    assert "chosen" not in done.out
    assert list(settings(eggroll.work / "run").values()) == [0.03, 0.1, "exponential", 2, 6, 3]
    done = bare("--sigma", "0.03", "-p", "6", "-g", "2", "--minutes", "0.001", "-o", "timed")
    assert done.status == 0, done.err
    found = settings(eggroll.work / "timed")
    assert (found["sigma"], found["population_size"], found["generations"]) == (0.03, 6, 2)


def test_a_time_is_kept(eggroll, bare):
    """However wrong the plan was, a complete generation is the end, with a held-out score of it."""
    done = bare("--eval-prompts", "held.txt", "--minutes", "0.03", "-o", "run")
    assert done.status == 0, done.err
    metrics = [json.loads(line) for line in (eggroll.work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "heldout_reward" in metrics[-1]
    assert metrics[-1]["elapsed_s"] < 10
    found = settings(eggroll.work / "run")
    assert any(
        line.startswith(f"{found['generations']} generations of ") for line in chosen(eggroll.work / "run")["lines"]
    )
    assert json.loads((eggroll.work / "run" / "config.json").read_text())["options"]["minutes"] == 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_population_that_was_chosen_is_as_one_that_was_given(eggroll, bare, monkeypatch, dtype):
    """The worker is made anew around the module whose members were tried."""
    monkeypatch.setattr("eggroll.llm.choosing.choose.fit", lambda *_, **__: Amount(2, 6, 3))
    assert bare("--minutes", "9", "--dtype", dtype, "-o", "chosen").status == 0
    found = settings(eggroll.work / "chosen")
    assert list(found.values())[3:] == [2, 6, 3]
    flags = [word for name, value in found.items() for word in (flag_of(name), str(value))]
    assert bare(*flags, "--dtype", dtype, "-o", "given").status == 0
    logs = [(eggroll.work / name / "updates.jsonl").read_text() for name in ("chosen", "given")]
    assert logs[0] == logs[1]


def test_a_score_without_a_difference_is_said_and_the_run_goes_on(eggroll):
    done = eggroll(*BARE[:3], "lambda text: 0.0", *BARE[4:], "-g", "1", "-o", "run")
    assert done.status == 0, done.err
    assert "warning: all members score the same (0) at every sigma that was tried" in done.out
    assert "give partial credit in the score, or prompts that the model can sometimes do" in done.out


@pytest.mark.parametrize(("given", "said"), [
    (["--minutes", "-1"], "minutes (=-1.0) must be above 0, or left out for no limit"),
    (["--sigma", "-1"], "sigma (=-1.0) must be above 0"),
])  # fmt: skip
def test_wrong_values(bare, given, said):
    done = bare(*given)
    assert done.status == 1
    assert said in done.err


def test_perplexity(eggroll):
    done = eggroll("tune", "tiny", "-r", "perplexity", "-d", "texts.txt", "-g", "1", "--max-length", "16", "-o", "run")
    assert done.status == 0, done.err
    record = chosen(eggroll.work / "run")
    assert record["levels"]
    assert settings(eggroll.work / "run")["sigma"] == record["sigma"]
