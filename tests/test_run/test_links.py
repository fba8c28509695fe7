"""A run's directory may come from anyone: no link in it is followed, and nothing in it makes a program wait."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from eggroll.errors import RunError
from eggroll.run import RunDir
from eggroll.run.files import write_atomic
from eggroll.run.report import write_report

FILES = ("config.json", "environment.json", "updates.jsonl", "metrics.jsonl", "samples.jsonl", "report.html")


@pytest.fixture
def victim(tmp_path):
    """A folder outside of the run that has to stay as it is."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_a_linked_file_is_refused(five, victim, name):
    path = five.path / name
    if path.exists():
        path.rename(victim / name)
    else:
        (victim / name).write_text("")
    path.symlink_to(victim / name)
    before = contents(victim)
    with pytest.raises(RunError, match=rf"{name} is a symbolic link where a file belongs\. Links in a run's directory"):
        RunDir.open(five.path)
    assert contents(victim) == before


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "model"])
def test_a_linked_folder_is_refused(five, victim, name):
    (five.path / name).symlink_to(victim)
    with pytest.raises(RunError, match=f"{name} is a symbolic link where a directory belongs"):
        RunDir.open(five.path)
    with pytest.raises(RunError, match=f"{name} is a symbolic link where a directory belongs"):
        five.folder(name)


def test_a_link_to_nothing_is_one_too(run):
    (run.path / "samples.jsonl").symlink_to("nowhere")
    with pytest.raises(RunError, match=r"samples\.jsonl is a symbolic link"):
        RunDir.open(run.path)


@pytest.mark.parametrize("action", ["rewind", "save later", "save there", "latest", "has"])
def test_a_linked_checkpoint_is_neither_removed_nor_written_through(five, victim, action):
    """Also after the run was opened."""
    (victim / "manifest.json").write_text("{}")
    five.save_checkpoint(2, {"w": torch.zeros(1)}, {})
    (five.path / "checkpoints" / "generation-000004").symlink_to(victim)
    before = contents(victim)
    actions = {
        "rewind": lambda: five.rewind(2),
        "save later": lambda: five.save_checkpoint(5, {"w": torch.zeros(1)}, {}, keep=1),
        "save there": lambda: five.save_checkpoint(4, {"w": torch.zeros(1)}, {}),
        "latest": five.latest_checkpoint,
        "has": lambda: five.has_checkpoint(4),
    }
    with pytest.raises(RunError, match="generation-000004 is a symbolic link where a directory belongs"):
        actions[action]()
    assert contents(victim) == before
    assert (five.path / "checkpoints" / "generation-000002" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["manifest.json", "tensors", ".tensors.part"])
def test_a_link_within_a_checkpoint(five, victim, name):
    path = five.save_checkpoint(2, {"w": torch.zeros(1)}, {})
    file = next(path.glob("tensors-*")) if name == "tensors" else path / name
    file.unlink(missing_ok=True)
    file.symlink_to(victim / "precious.txt")
    before = contents(victim)
    with pytest.raises(RunError, match="is a symbolic link where a file belongs"):
        five.save_checkpoint(2, {"w": torch.ones(1)}, {})
    assert contents(victim) == before


def test_appending_does_not_follow_a_link_that_came_later(five, victim, record):
    five.append_samples([{"generation": 5}])
    (five.path / "samples.jsonl").unlink()
    (five.path / "samples.jsonl").symlink_to(victim / "precious.txt")
    with pytest.raises(RunError, match=r"samples\.jsonl is a symbolic link"):
        five.append_samples([{"generation": 6}])
    assert contents(victim) == {"precious.txt": b"mine"}


def test_an_atomic_write_replaces_a_link_and_writes_through_none(tmp_path, victim):
    target = tmp_path / "report.html"
    target.symlink_to(victim / "precious.txt")
    (tmp_path / f".report.html.{os.getpid()}.part").symlink_to(victim / "precious.txt")
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert not target.is_symlink()
    assert contents(victim) == {"precious.txt": b"mine"}


@pytest.mark.parametrize("name", [*FILES, "model/config.json"])
def test_a_named_pipe_is_refused_and_nobody_waits_for_it(five, name):
    path = five.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(RunError, match=f"{name} is a named pipe, where a file belongs; move it away"):
        RunDir.open(five.path)
    if name.endswith("s.jsonl"):
        with pytest.raises(RunError, match="is a named pipe"):
            write_report(five)


def test_a_socket_and_a_directory_are_refused(run, monkeypatch):
    monkeypatch.chdir(run.path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("samples.jsonl")
        with pytest.raises(RunError, match=r"samples\.jsonl is a socket, where a file belongs"):
            RunDir.open(run.path)
    (run.path / "samples.jsonl").unlink()
    (run.path / "samples.jsonl").mkdir()
    with pytest.raises(RunError, match=r"samples\.jsonl is a directory, where a file belongs"):
        RunDir.open(run.path)


def test_the_run_itself_may_be_reached_by_a_link(five, tmp_path, record):
    (tmp_path / "newest").symlink_to(five.path)
    again = RunDir.open(tmp_path / "newest")
    again.append_update(record(5))
    assert len(five.updates()) == 6


def test_a_new_run_is_not_made_around_a_link(tmp_path, victim):
    place = tmp_path / "new"
    place.mkdir()
    (place / "updates.jsonl").symlink_to(victim / "new")
    with pytest.raises(RunError, match=r"updates\.jsonl is a symbolic link"):
        RunDir.create(place, {})
    assert not (place / "config.json").exists()
