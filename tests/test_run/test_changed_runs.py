"""A resumed run is the run that was begun: what it reads and what it wrote are as they were, or an error says so."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_run.toys import KIND, quick, resume, train

from eggroll import lifecycle
from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError, RunError
from eggroll.run import RunDir
from eggroll.run.checkpoint import DamagedCheckpointWarning


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run of three generations, which read ``data.txt``, and one of five that nobody touches."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder), quick():
        (folder / "data.txt").write_text("abc")
        train(output="base", data="data.txt")
        weights = train(output="whole", generations=5).worker.weights
    return folder, weights


@pytest.fixture
def base(finished, tmp_path, monkeypatch):
    """A copy of the first run, in the folder where we are."""
    shutil.copytree(finished[0] / "base", tmp_path / "base")
    (tmp_path / "data.txt").write_text("abc")
    monkeypatch.chdir(tmp_path)
    with quick():
        yield Path("base")


@pytest.fixture
def whole(finished):
    """The weights after five generations of a run that nobody touched."""
    return finished[1]


def edit(path, change, line=None):
    """Change a JSON file, or a line of a log."""
    lines = [path.read_text()] if line is None else path.read_text().splitlines()
    values = json.loads(lines[line or 0])
    change(values)
    lines[line or 0] = json.dumps(values)
    path.write_text("\n".join(lines) + "\n")


def test_a_run_that_nobody_touched_goes_on(base, whole):
    assert np.array_equal(resume(base, generations=5).worker.weights, whole)


def test_changed_data_are_said_and_can_be_accepted(base):
    (base.parent / "data.txt").write_text("abcd")
    with pytest.raises(RunError) as caught:
        resume(base, generations=4)
    assert str(caught.value) == (
        f"what the run in {base} reads has changed since it began:\n"
        "  - data fingerprint: abc in the run, abcd now\n"
        "Put it back as it was, or start a new run in another directory (-o). To go on all the same, add "
        "--accept-changes; environment.json will say what had changed"
    )
    with pytest.warns(UserWarning, match=r"accepted, and noted in .*: data fingerprint: abc in the run, abcd now"):
        resume(base, generations=4, accept_changes=True)
    run = RunDir.open(base)
    assert run.environment["resumed"][-1]["accepted_changes"] == ["data fingerprint: abc in the run, abcd now"]
    assert "accept_changes" not in run.config["options"]
    resume(base, generations=5)  # accepted for good
    (base.parent / "data.txt").write_text("abc")
    with pytest.raises(RunError, match="abcd in the run, abc now"):
        resume(base, generations=6)


def test_a_run_directory_cannot_accept_changes(base):
    (base.parent / "data.txt").write_text("abcd")
    run = RunDir.open(base)
    run.update_config({**run.config, "options": {**run.config["options"], "accept_changes": True}})
    with pytest.raises(RunError, match="has changed since it began"):
        resume(base, generations=4)


def test_edited_settings(base):
    edit(base / "config.json", lambda config: config["options"].update(seed=7))
    run = RunDir.open(base)
    for call in (lambda: resume(base), lambda: lifecycle.replay(KIND, run)):
        with pytest.raises(RunError, match=r"config\.json was changed after the run wrote it: its checksum is another"):
            call()
    edit(base / "config.json", lambda config: config.pop("check"))  # as of an older version
    with pytest.raises(RunError, match=r"its newest checkpoint was written with:\n  - seed: 42 there, 7 now\n"):
        resume(base, generations=4)
    edit(base / "config.json", lambda config: config["options"].update(seed=42))
    resume(base, generations=4)


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("name", ["sigma", "lr", "generation", "shaped_fitness"])
def test_a_changed_record(base, line, name):
    """Whether a checkpoint covers it or not, the last line included."""

    def change(values):
        values[name] = values[name][::-1] if name == "shaped_fitness" else values[name] + 1

    edit(base / "updates.jsonl", change, line)
    for path in (base / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(RunError, match=rf"updates\.jsonl, line {line + 1} is "):
        resume(base, generations=4)
    with pytest.raises(RunError, match=rf"updates\.jsonl, line {line + 1} is "):
        lifecycle.replay(KIND, RunDir.open(base))


def test_records_in_another_order_and_without_their_checksum(base):
    path = base / "updates.jsonl"
    lines = path.read_text().splitlines()
    edit(path, lambda values: values.pop("check"), 1)
    with pytest.raises(RunError, match=r"line 2 has no checksum, unlike those before it: this line or one before it"):
        resume(base, generations=4)
    other = UpdateRecord.make(0, 0.5, 0.5, np.ones(4, np.float32)).to_json()
    path.write_text("\n".join([other, *lines[1:]]) + "\n")  # the first as of an older version: the second knows it
    with pytest.raises(RunError, match="line 2 is not what its checksum says"):
        resume(base, generations=4)


def test_a_log_of_an_older_version_goes_on_with_checksums(base, whole):
    path = base / "updates.jsonl"
    for line in range(3):
        edit(path, lambda values: values.pop("check"), line)
    for manifest in (base / "checkpoints").rglob("manifest.json"):
        edit(manifest, lambda values: [values.pop(name) for name in ("check", "log")])
    edit(base / "config.json", lambda config: [config.pop(name) for name in ("check", "data_fingerprint")])
    assert np.array_equal(resume(base, generations=5).worker.weights, whole)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["check" in line for line in lines] == [False] * 3 + [True] * 2
    assert RunDir.open(base).config["data_fingerprint"] == "abc"
    edit(path, lambda values: values.update(lr=0.5), 1)  # from now on, older lines are covered as well
    with pytest.raises(RunError, match="line 4 is not what its checksum says"):
        RunDir.open(base).updates()


def test_the_log_of_another_run(base):
    train(output="other", seed=1)
    (base / "updates.jsonl").write_bytes(Path("other/updates.jsonl").read_bytes())
    with pytest.raises(CheckpointError, match=r"updates\.jsonl is not the log that .*generation-000003 was made of"):
        resume(base, generations=4)


@pytest.mark.parametrize("old", [False, True])
def test_a_manifest_of_another_generation_is_not_believed(base, whole, old):
    """The checkpoint before it is used."""
    path = base / "checkpoints/generation-000003/manifest.json"
    edit(path, lambda manifest: manifest.update(generation=2))
    if old:
        edit(path, lambda manifest: manifest.pop("check"))
    reason = "it is of generation 2, unlike its directory" if old else "its contents are not what its checksum says"
    with pytest.warns(DamagedCheckpointWarning, match=reason):
        found = resume(base, generations=5)
    assert np.array_equal(found.worker.weights, whole)


def test_tensors_of_another_model(base):
    run = RunDir.open(base)
    run.save_checkpoint(3, {"other": np.ones(2)}, {})
    with pytest.raises(CheckpointError, match=r"generation-000003 does not fit this run: KeyError: 'weights'"):
        resume(base, generations=4)


PROGRAM = "import helper\nfrom package.inner import more\ndef shape(scores):\n    return scores - scores.mean()\n"


@pytest.mark.parametrize("changed", ["shaping.py", "helper.py", "package/inner.py"])
def test_the_source_of_a_program(tmp_path, monkeypatch, changed):
    """That of a module that a setting names, with what it imports from beside it, and nothing else."""
    for module in ("shaping", "helper", "package", "package.inner"):  # of the test before
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").mkdir()
    for name in ("helper.py", "package/__init__.py", "package/inner.py", "package/unused.py"):
        (tmp_path / name).write_text("more = 1\n")
    (tmp_path / "shaping.py").write_text(PROGRAM)
    options = {"fitness_shaping": "shaping:shape"}
    with quick():
        train(output="base", **options)
        (tmp_path / "package/unused.py").write_text("more = 2\n")
        again = dataclasses.replace(lifecycle.options_of_run(KIND, "base"), resume="base", generations=4)
        assert lifecycle.train(KIND, again).generation == 4
    with (tmp_path / changed).open("a") as file:
        file.write("# changed\n")
    with pytest.raises(RunError, match=r"  - fitness shaping source: \w{16} in the run, \w{16} now"):
        lifecycle.train(KIND, again)
