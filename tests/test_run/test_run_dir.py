"""The run directory: made once, opened often, rewound, and never silently continued with other settings."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from eggroll.errors import RunError, RunWriteError
from eggroll.run import RunDir


def test_a_run_comes_back_as_it_was_made(run):
    again = RunDir.open(run.path)
    assert again.config == {"generations": 10, "sigma": 0.01, "layers": [1, 2]} == run.config
    assert again.environment == run.environment
    assert again.updates() == again.metrics() == again.samples() == []
    assert again.latest_checkpoint() is None


def test_a_directory_that_holds_a_run_is_refused(run):
    with pytest.raises(RunError) as caught:
        RunDir.create(run.path, {})
    assert str(caught.value) == (
        f"{run.path} already holds a run (config.json is there). "
        "Continue it with --resume, or choose another directory with -o"
    )
    assert RunDir.open(run.path).config["sigma"] == 0.01


def test_logs_without_a_config_are_not_overwritten(five):
    (five.path / "config.json").unlink()
    with pytest.raises(RunError, match=r"already holds a run \(updates.jsonl is there\)"):
        RunDir.create(five.path, {})


def test_a_directory_with_other_files_may_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "environment.json").write_text("{}")  # left by a start that was killed
    (tmp_path / ".config.json.7.part").write_text("{")
    RunDir.create(tmp_path, {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "environment.json", "notes.txt"]


def test_a_path_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunWriteError, match="could not be written: Not a directory"):
        RunDir.create(tmp_path / "file" / "run", {})


def test_opening_what_is_not_there_says_where_runs_are(run, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    with pytest.raises(RunError, match=r"^gone does not exist. Give the directory that a run was told to be in \(-o\)"):
        RunDir.open("gone")
    RunDir.create(Path("runs/first"), {})
    with pytest.raises(RunError, match=r"^gone does not exist. Runs in runs: first$"):
        RunDir.open("gone")


def test_opening_what_is_not_there_lists_the_runs_beside_it(run):
    with pytest.raises(RunError) as caught:
        RunDir.open(run.path.parent / "demmo")
    assert str(caught.value) == (f"{run.path.parent / 'demmo'} does not exist. Runs in {run.path.parent}: demo")
    with pytest.raises(RunError, match=r"holds no run \(no config.json\). Runs in .*: demo"):
        RunDir.open(run.path.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1', r"config.json is not JSON \(Expecting ',' delimiter.*restore it"),
        ("[1]", "config.json must hold a JSON object, not list; restore it"),
        ("\udcff", "config.json is not JSON"),
    ],
)
def test_a_config_that_is_not_json(run, text, message):
    (run.path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunError, match=message):
        RunDir.open(run.path)


def test_a_changed_config_is_listed_key_by_key(run):
    with pytest.raises(RunError) as caught:
        run.check_config({"generations": 20, "sigma": 0.02, "rank": 4}, may_change={"generations"})
    assert str(caught.value) == (
        f"the run in {run.path} was started with other settings:\n"
        "  - sigma: 0.01 in the run, 0.02 now\n"
        "  - layers: [1, 2] in the run, (not set) now\n"
        "  - rank: (not set) in the run, 4 now\n"
        "Resume it with the settings it has, or start a new run in another directory (-o). "
        "Only generations may change."
    )


def test_the_same_config_passes_with_tuples_and_with_keys_that_may_change(run):
    run.check_config({"generations": 10, "sigma": 0.01, "layers": (1, 2)})
    run.check_config({"generations": 99, "sigma": 0.01, "layers": [1, 2]}, may_change=["generations"])


def test_a_longer_run_is_written_to_the_config(run):
    run.update_config({**run.config, "generations": 20})
    assert RunDir.open(run.path).config == {"generations": 20, "sigma": 0.01, "layers": [1, 2]} == run.config


def test_records_come_back_bit_for_bit(five, record):
    assert RunDir.open(five.path).updates() == [record(generation) for generation in range(5)]
    assert five.updates(stop=2) == [record(0), record(1)]


def test_records_must_follow_each_other(five, record):
    with pytest.raises(RunError, match=r"holds 5 generations, so the next record must be of generation 5, not 6"):
        five.append_update(record(6))
    with pytest.raises(RunError, match=r"not 4; call rewind\(4\) to drop later ones"):
        RunDir.open(five.path).append_update(record(4))
    five.append_update(record(5))
    assert len(five.updates()) == 6


def test_a_torn_record_is_left_out_and_replaced(five, record):
    path = five.path / "updates.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = RunDir.open(five.path)
    assert len(again.updates()) == 4
    again.append_update(record(4))
    assert again.updates() == [record(generation) for generation in range(5)]


@pytest.mark.parametrize("generation", [1, 3, 5])
def test_rewind_keeps_what_was_finished(five, record, generation):
    again = RunDir.open(five.path)
    again.rewind(generation)
    assert again.updates() == [record(index) for index in range(generation)]
    assert [line["generation"] for line in again.metrics()] == list(range(generation + 1))
    assert [line["generation"] for line in again.samples()] == list(range(1, generation + 1))
    again.append_update(record(generation))
    assert len(again.updates()) == generation + 1


def test_rewind_to_0_starts_over(five):
    five.rewind(0)
    assert five.updates() == five.metrics() == five.samples() == []


def test_rewind_to_the_end_drops_what_a_killed_generation_has_left(five):
    five.append_samples([{"generation": 6, "member": 0}])
    five.append_metrics({"generation": 6})
    again = RunDir.open(five.path)
    again.rewind(len(again.updates()))
    assert again.metrics()[-1]["generation"] == again.samples()[-1]["generation"] == 5


def test_rewind_removes_later_checkpoints(five):
    for generation in (2, 4):
        five.save_checkpoint(generation, {"w": torch.zeros(1)}, {})
    five.rewind(3)
    assert five.latest_checkpoint().generation == 2


def test_rewind_beyond_the_log_changes_nothing(five):
    five.save_checkpoint(5, {"w": torch.zeros(1)}, {})
    before = five.metrics()
    with pytest.raises(
        RunError, match=r"cannot go back to generation 6 of .*holds 5 finished generations; choose 0 to 5"
    ):
        five.rewind(6)
    assert five.metrics() == before
    assert five.latest_checkpoint().generation == 5


@pytest.mark.parametrize("line", [{}, {"generation": 1.5}, {"generation": True}])
def test_a_line_without_a_generation_is_refused(run, line):
    with pytest.raises(RunError, match="a line of a log needs 'generation', the number of finished updates; got"):
        run.append_metrics(line)


def test_samples_are_all_or_none(run):
    with pytest.raises(RunError, match="needs 'generation'"):
        run.append_samples([{"generation": 1}, {}])
    assert run.samples() == []
    run.append_samples([])
    assert not (run.path / "samples.jsonl").exists()


def test_a_resume_is_noted_in_the_environment(run):
    run.note_resume(3, ["eggroll", "tune", "--resume"])
    run.note_resume(7)
    noted = RunDir.open(run.path).environment
    assert [entry["generation"] for entry in noted["resumed"]] == [3, 7]
    assert noted["resumed"][0]["command"] == ["eggroll", "tune", "--resume"]
    assert noted["run_id"] == run.environment["run_id"]


def test_extra_facts_are_in_the_environment(tmp_path):
    run = RunDir.create(tmp_path / "r", {}, command=["eggroll", "tune"], extra={"model": "tiny"})
    written = json.loads((run.path / "environment.json").read_text())
    assert written["model"] == "tiny"
    assert written["command"] == ["eggroll", "tune"]


def test_two_runs_have_different_ids(tmp_path):
    runs = [RunDir.create(tmp_path / name, {}) for name in "ab"]
    assert runs[0].environment["run_id"] != runs[1].environment["run_id"]


def test_its_config_and_environment_cannot_be_overwritten_by_name(run):
    for name in ("config.json", "../x", "a/b"):
        with pytest.raises(RunWriteError, match="is not the name of a file that can be written into"):
            run.write_file(name, b"")


def test_errors_survive_pickling(run):
    with pytest.raises(RunError) as caught:
        RunDir.create(run.path, {})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
