"""Runs that are stopped in every way and continued end as if nothing had happened, bit for bit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eggroll.run.run_dir import RunDir

SETTINGS = {
    "adam": [],
    "momentum, 16 bit": ["--optimizer", "momentum", "--dtype", "bfloat16"],
    "sampled, one-sided, noise kept": ["--temperature", "0.8", "--sampling", "one_sided", "--noise-reuse", "2"],
    "schedules": ["--optimizer", "adamw", "--weight-decay", "0.1", "--lr-decay", "0.9", "--sigma-schedule", "cosine"],
}
INTERRUPTS = """
import os, signal
from pathlib import Path
calls = Path("calls")
stops = {stops}
def reward(prompts, completions):
    done = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (done + 1))
    if done in stops:
        os.kill(os.getpid(), {signal})
    return [float(sum(map(ord, text)) % 97) for text in completions]
"""


def same(one, other):
    """Whether two finished runs are equal: every record, every tensor of the last checkpoint, the saved model."""
    one, other = RunDir.open(one), RunDir.open(other)
    assert (one.path / "updates.jsonl").read_bytes() == (other.path / "updates.jsonl").read_bytes()
    mine, theirs = one.latest_checkpoint(), other.latest_checkpoint()
    assert mine.generation == theirs.generation == len(one.updates())
    ours, others = mine.load(), theirs.load()
    assert list(ours) == list(others)
    assert all(ours[name].equal(others[name]) for name in ours)
    saved = [(run.path / "model" / "model.safetensors").read_bytes() for run in (one, other)]
    assert saved[0] == saved[1]
    for read in (RunDir.metrics, RunDir.samples):
        keys = [
            [(line["generation"], line.get("event"), line.get("member")) for line in read(run)] for run in (one, other)
        ]
        assert keys[0] == keys[1]
    results = [
        [(line.get("fitness_mean"), line.get("heldout_reward")) for line in run.metrics()] for run in (one, other)
    ]
    assert results[0] == results[1]
    return True


# Each case takes ten seconds where cores are slow: two of them are enough for every day.
EVERY_DAY = ("adam", "sampled, one-sided, noise kept")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in EVERY_DAY else pytest.mark.slow) for case in SETTINGS]
)
def test_stopped_and_continued_is_the_same_run(eggroll, case):
    """With schedules, the length of the run is a setting like others, so the run is stopped by Ctrl-C."""
    (eggroll.work / "mine.py").write_text(INTERRUPTS.format(stops="{3}", signal="signal.SIGINT"))
    arguments = [*eggroll.tune_arguments[1:], "-r", "mine.py", "-g", "6", "--checkpoint-every", "2", *SETTINGS[case]]
    assert eggroll("tune", *arguments, "-o", "stopped").status == 130
    assert len(RunDir.open("stopped").updates()) == 3
    assert eggroll("tune", "tiny", "--resume", "stopped").status == 0
    (eggroll.work / "calls").write_text("x" * 100)
    assert eggroll("tune", *arguments, "-o", "whole").status == 0
    assert same("stopped", "whole")


def test_more_generations(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    for generations in ("3", "5"):
        done = eggroll("tune", "--resume", "run", "-g", generations)
        assert done.status == 0, done.err
    assert f"generation 3 of {generations}" in done.out
    assert eggroll.tune("-g", "5", "-o", "whole").status == 0
    assert same("run", "whole")
    config = RunDir.open("run").config
    assert config["options"]["generations"] == 5
    environment = RunDir.open("run").environment
    assert [entry["generation"] for entry in environment["resumed"]] == [2, 3]


def test_a_finished_run_stays_as_it_is(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    before = (
        (eggroll.work / "run/updates.jsonl").read_bytes(),
        (eggroll.work / "run/model/model.safetensors").read_bytes(),
    )
    done = eggroll("tune", "--resume", "run")
    assert done.status == 0
    after = (
        (eggroll.work / "run/updates.jsonl").read_bytes(),
        (eggroll.work / "run/model/model.safetensors").read_bytes(),
    )
    assert before == after


def test_fewer_generations_are_refused(eggroll):
    assert eggroll.tune("-g", "3", "-o", "run").status == 0
    done = eggroll("tune", "--resume", "run", "-g", "1")
    assert done.status == 1
    assert (
        "error: --generations 1: the run in run has 3 finished generations already; give more, or rebuild an earlier "
        "one: eggroll replay run --to 1"
    ) in done.err
    assert RunDir.open("run").setting("generations") == 3


def test_changed_settings_are_refused(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    before = (eggroll.work / "run/config.json").read_bytes()
    done = eggroll("tune", "tiny", "--resume", "run", "--sigma", "0.5", "--target-modules", "q_proj", "-g", "3")
    assert done.status == 1
    assert done.err == (
        "error: the run in run was started with other settings:\n"
        "  - --sigma: 0.05 in the run, 0.5 now\n"
        '  - --target-modules: not given in the run, ["q_proj"] now\n'
        "Leave them out, as --resume takes them from the run, or start a new run in another directory (-o). Only "
        "--generations, --members-per-forward, --eval-every, --checkpoint-every, --samples-per-generation, "
        "--judge-requests, --judge-rate, --judge-timeout, --judge-failures, --device, --patience, "
        "--report-to, --workers, --ray-address, --worker-cpus, --worker-gpus, --minutes, --keep, "
        "--engine-args, --push-to-hub, --hub-model-id, --hub-private may change.\n"
    )
    assert (eggroll.work / "run/config.json").read_bytes() == before
    assert "--output: " in eggroll("tune", "--resume", "run", "-o", "elsewhere").err
    (eggroll.work / "tiny2").symlink_to(eggroll.work / "tiny")
    assert 'MODEL: "tiny" in the run, "tiny2" now' in eggroll("tune", "tiny2", "--resume", "run").err
    assert len(RunDir.open("run").updates()) == 2


def test_runs_from_before_an_option_existed(eggroll):
    assert eggroll.tune("-g", "1", "-o", "run").status == 0
    path = eggroll.work / "run/config.json"
    config = json.loads(path.read_text())
    del config["options"]["noise_reuse"]
    del config["check"]  # nor did this
    path.write_text(json.dumps(config))
    done = eggroll("tune", "--resume", "run", "-g", "2")
    assert done.status == 0, done.err
    assert "--noise-reuse: 1 in the run, 2 now" in eggroll("tune", "--resume", "run", "--noise-reuse", "2").err


def test_no_run_to_resume(eggroll):
    done = eggroll("tune", "tiny", "--resume", "nowhere")
    assert done.status == 1
    assert done.err.startswith("error: nowhere does not exist.")


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(eggroll):
    (eggroll.work / "mine.py").write_text(INTERRUPTS.format(stops="{2}", signal="signal.SIGINT"))
    arguments = [*eggroll.tune_arguments[1:], "-r", "mine.py", "-g", "5"]
    done = eggroll("tune", *arguments, "-o", "run")
    assert done.status == 130
    assert "interrupted after generation 2; continue with\n         eggroll tune tiny --resume run\n" in done.out
    assert RunDir.open("run").latest_checkpoint().generation == 2
    assert (eggroll.work / "run/model/model.safetensors").exists()
    assert (eggroll.work / "run/report.html").exists()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_after_ctrl_c_scores_are_named_with_their_generation(eggroll, keep):
    """The last weights are later ones than those of the last held-out score."""
    program = INTERRUPTS.format(stops="{5}", signal="signal.SIGINT")
    (eggroll.work / "mine.py").write_text(program)
    arguments = [*eggroll.tune_arguments[1:], "-r", "mine.py", "-g", "5", "--eval-every", "2"]
    done = eggroll("tune", *arguments, "--eval-prompts", "held.txt", "-o", "run", "--keep", keep)
    assert done.status == 130
    scores = [
        (line["generation"], line["heldout_reward"])
        for line in RunDir.open("run").metrics()
        if "heldout_reward" in line
    ]
    reached = RunDir.open("run").latest_checkpoint().generation
    assert [generation for generation, _ in scores] == [0, 2]
    assert reached == 3
    line = f"held-out reward  {scores[0][1]:.3f} before, {scores[1][1]:.3f} after generation 2"
    if keep == "last":
        line += " (the saved model is that of generation 3, which has no score)"
    assert f"{line}\n" in done.out
    assert f" at generation 2, and generation 3 has no score; saved: {keep}\n" in done.out
    row = eggroll("runs", ".").out
    assert " stopped " in row
    assert " ended " not in row
    assert "held-out answers (of 2) that changed after generation 2, with their rewards" in " ".join(done.out.split())
    done = eggroll("tune", "--resume", "run")
    assert done.status == 0
    assert re.search(r"held-out reward  \S+ before, \S+ after( generation [24])?\n", done.out)


def test_ctrl_c_in_the_first_generation(eggroll):
    (eggroll.work / "mine.py").write_text(INTERRUPTS.format(stops="{0}", signal="signal.SIGINT"))
    arguments = [*eggroll.tune_arguments[1:], "-r", "mine.py", "-g", "2"]
    done = eggroll("tune", *arguments, "-o", "run")
    assert done.status == 130
    assert "interrupted before the first generation was complete" in done.out
    assert eggroll("tune", "--resume", "run").status == 0
    (eggroll.work / "calls").write_text("x" * 100)
    assert eggroll("tune", *arguments, "-o", "whole").status == 0
    assert same("run", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["signal.SIGINT", "signal.SIGTERM"])
def test_stopped_again_and_again(eggroll, signal):
    """Also during held-out evaluations: calls 0 (start), 3, 6, ... are those of the centre."""
    (eggroll.work / "mine.py").write_text(INTERRUPTS.format(stops="{0, 3, 4, 8, 12}", signal=signal))
    arguments = [*eggroll.tune_arguments[1:], "-r", "mine.py", "--eval-prompts", "held.txt", "--eval-every", "2"]
    status = eggroll("tune", *arguments, "-g", "6", "-o", "run").status
    rounds = 1
    while status == 130:
        status = eggroll("tune", "--resume", "run").status
        rounds += 1
        assert rounds < 20
    assert status == 0
    assert rounds == 6
    (eggroll.work / "calls").write_text("x" * 100)
    assert eggroll("tune", *arguments, "-g", "6", "-o", "whole").status == 0
    one, other = RunDir.open("run"), RunDir.open("whole")
    assert (one.path / "updates.jsonl").read_bytes() == (other.path / "updates.jsonl").read_bytes()
    assert one.latest_checkpoint().tensors["sha256"] == other.latest_checkpoint().tensors["sha256"]
    assert [line["generation"] for line in one.metrics() if "event" not in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_killed_at_random_moments(work):
    """kill -9 eight times; see kill_script.py."""
    script = Path(__file__).with_name("kill_script.py")
    done = subprocess.run(
        [sys.executable, script, "8"],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert same("killed", "whole")
    assert "kills: 8" in done.stdout
