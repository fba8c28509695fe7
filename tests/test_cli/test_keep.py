"""``eggroll tune --keep`` and ``--patience``: what a run saves, and what it says about it."""

import json
import shlex

import torch
from safetensors.torch import load_file

from eggroll.run.console import number
from eggroll.run.run_dir import RunDir

WORSE = """
def score(text):
    calls = open("calls", "a+")
    calls.write("x")
    calls.flush()
    return -float(calls.tell())
"""
"""Each call gives less than the one before: generation 1 is the best trained one."""


def tune(eggroll, *more):
    (eggroll.work / "worse.py").write_text(WORSE)
    held = ("-r", "worse.py", "--eval-prompts", "held.txt", "--eval-every", "1", "--checkpoint-every", "1")
    return eggroll.tune(*held, "-o", "run", *more)


def weights(path):
    return load_file(path / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_generation_is_saved_and_said_everywhere(eggroll):
    done = tune(eggroll, "-g", "4")
    assert done.status == 0, done.err
    run = RunDir.open(eggroll.work / "run")
    scores = [number(line["heldout_reward"]) for line in run.metrics()]
    kept = f"best {scores[1]} at generation 1, last {scores[4]} at 4; saved: best"
    assert f"\nkept     {kept}\n" in done.out
    before, after = (f"{line['heldout_reward']:.3f}" for line in run.metrics()[:2])
    assert f"held-out reward  {before} before, {after} after generation 1\n" in done.out
    assert f"\n# generation 1: {kept}\nfrom transformers import" in done.out
    assert f"# generation 1: {kept}" in (run.path / "model" / "README.md").read_text()
    assert f"| kept | {kept} |" in (run.path / "model" / "README.md").read_text()
    about = json.loads((run.path / "model" / "eggroll.json").read_text())
    assert (about["generations"], about["kept"]) == (1, kept)
    assert kept in (run.path / "report.html").read_text()
    result = json.loads((run.path / "result.json").read_text())
    assert (result["saved"], result["saved_generation"], result["last_generation"]) == ("best", 1, 4)
    for generation in (1, 4):
        assert eggroll(*shlex.split(f"replay run --to {generation} -o at-{generation}")).status == 0
    saved = weights(run.path / "model")
    assert equal(saved, weights(eggroll.work / "at-1"))
    assert not equal(saved, weights(eggroll.work / "at-4"))


def test_the_last_generation_is_saved(eggroll):
    done = tune(eggroll, "-g", "2", "--keep", "last")
    assert done.status == 0, done.err
    assert "at 2; saved: last\n" in done.out
    assert eggroll(*shlex.split("replay run --to 2 -o at-2")).status == 0
    assert equal(weights(eggroll.work / "run" / "model"), weights(eggroll.work / "at-2"))


def test_patience_ends_a_run_that_does_not_get_better(eggroll):
    done = tune(eggroll, "-g", "9", "--patience", "2")
    assert done.status == 0, done.err
    assert "stopped early after generation 2: 2 evaluations in a row (" in done.out
    assert "did not beat the score from before training" in done.out
    run = RunDir.open(eggroll.work / "run")
    assert len(run.updates()) == 2
    assert json.loads((run.path / "result.json").read_text())["stopped_early"] is True
    assert "stopped early after 2 of 9 generations" in (run.path / "report.html").read_text()
    assert eggroll("runs", ".").out.count("ended") == 1
    longer = eggroll("tune", "--resume", "run", "--patience", "3", "-r", "worse.py")
    assert longer.status == 0, longer.err
    assert len(RunDir.open(eggroll.work / "run").updates()) == 3


def test_patience_without_held_out_data(eggroll):
    done = eggroll.tune("-g", "1", "--patience", "2", "-o", "run")
    assert done.status == 1
    assert "patience (=2) counts evaluations on held-out data, and there are no held-out data" in done.err
    assert not (eggroll.work / "run").exists()


def test_a_run_that_is_pulled_towards_its_start_resumes_and_replays(eggroll):
    given = ("--anchored-weight-decay", "2", "--checkpoint-every", "2", "--dtype", "bfloat16")
    for name, generations in (("whole", "4"), ("run", "2")):
        assert eggroll.tune("-g", generations, *given, "-o", name).status == 0
    assert eggroll("tune", "--resume", "run", "-g", "4").status == 0
    saved = weights(eggroll.work / "whole" / "model")
    assert equal(saved, weights(eggroll.work / "run" / "model"))
    done = eggroll(*shlex.split("replay run --to 4 -o at-4"))
    assert done.status == 0, done.err
    assert equal(saved, weights(eggroll.work / "at-4"))
    assert eggroll.tune("-g", "4", *given[2:], "-o", "plain").status == 0
    assert not equal(saved, weights(eggroll.work / "plain" / "model"))
