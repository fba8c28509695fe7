"""The measurement of what conversations teach: runs are made, resumed, stopped in time and kept."""

import json
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def learning(load):
    return load("worlds/learning")


def write_run(run, values):
    (run / "model").mkdir(parents=True)
    (run / "model" / "eggroll.json").write_text("{}")
    lines = [{"generation": g, "heldout_reward": v, "evaluate_s": 50.0, "update_s": 10.0} for g, v in enumerate(values)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    difference = {"mean": {"value": 0.2, "low": 0.1, "high": 0.3}}
    models = [{"model": "smollm2-135m", "right": 0}, {"model": str(run / "model"), "right": 1}]
    (run / "eval.json").write_text(json.dumps({"models": models, "difference": difference, "samples": 4}))


def test_commands_of_new_and_cut_off_runs(learning, tmp_path):
    run = learning.directory_of(tmp_path, "guess_number", 43)
    made = learning.command_of(run, "guess_number", 43, ["--lr", "1"])
    assert made[2:7] == ["eggroll.cli.main", "tune", "smollm2-135m", "--task", "guess_number"]
    assert made[-2:] == ["--lr", "1"]
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert learning.command_of(run, "guess_number", 43, [])[-2:] == ["--resume", str(run)]


def test_a_run_is_stopped_when_its_time_is_used_up(learning, tmp_path, monkeypatch):
    run, sent = tmp_path / "run", []

    class Process:
        def poll(self):
            return 0 if sent else None

        def wait(self):
            return 0

        kill = wait

        def terminate(self):
            sent.append("terminate")

    def start(command):
        write_run(run, [0.1])
        return Process()

    def later(seconds):
        assert not sent
        write = (run / "metrics.jsonl").open("a")
        write.write(json.dumps({"generation": 1, "evaluate_s": 90.0}) + "\n")
        write.close()

    monkeypatch.setattr(learning, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(learning.time, "sleep", later)
    learning.train(run, "maze", 1, 2.0, [])
    assert sent == ["terminate"]
    assert learning.spent(run) == 150.0
    assert learning.finished(run, 2.0)
    assert not learning.finished(run, 3.0)


def test_finished_runs_are_kept_and_written(learning, tmp_path, monkeypatch, capsys):
    for seed, after in ((42, 0.5), (43, 0.3)):
        write_run(learning.directory_of(tmp_path, "guess_number", seed), [0.1, 0.2, after])
    monkeypatch.setattr(learning, "train", lambda *a: None)
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["learning.py", "--folder", str(tmp_path), "--minutes", "3", "--write"])
    learning.main()
    said = capsys.readouterr().out
    assert "seed 42: held-out 0.100 -> 0.500 after 2 generations, 3 minutes; test conversations +0.200" in said
    assert "2 of 2 seeds rose, by +0.300 on average" in said
    (result,) = (tmp_path / "worlds").glob("*.json")
    runs = json.loads(result.read_text())["runs"]
    assert [model["model"] for model in runs["43"]["test"]["models"]] == ["smollm2-135m", "guess-number-43/model"]
    assert runs.keys() == {"42", "43"}
    assert str(tmp_path) not in result.read_text()
