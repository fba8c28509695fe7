"""Threads of a run: they sleep while they wait, and there are fewer of them where other programs use the cores."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from eggroll import _environment
from eggroll.cli import cores

NEW = SimpleNamespace(resume=None, workers=None)
VARIABLES = (*_environment.WAITING, *_environment.THREADS)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """``machine(cores=8, running=3)``: what the system says; and ``chosen``, the threads that were set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "BETWEEN_S", 0.0)
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    chosen = []
    monkeypatch.setattr(cores, "set_threads", chosen.append)

    def system(*, cores_there, running, usual=None):
        chosen.clear()
        (tmp_path / "stat").write_text(f"cpu 1 2 3\nprocs_running {running}\nprocs_blocked 0\n")
        monkeypatch.setattr(cores.os, "cpu_count", lambda: cores_there)
        monkeypatch.setattr(torch, "get_num_threads", lambda: usual or cores_there)
        return chosen

    return system


@pytest.mark.parametrize(
    ("cores_there", "usual", "running", "threads"),
    [(2, 2, 1, None), (2, 2, 2, 1), (2, 2, 30, 1), (8, 8, 4, 5), (64, 4, 50, None), (64, 4, 63, 2), (1, 1, 9, None)],
)
def test_fewer_threads_where_others_compute(machine, cores_there, usual, running, threads):
    chosen = machine(cores_there=cores_there, running=running, usual=usual)
    line = cores.choose_threads(NEW)
    assert chosen == ([] if threads is None else [threads])
    if threads is None:
        assert line is None
    else:
        assert line.startswith(f"{threads} thread{'s' if threads > 1 else ''} instead of {usual}: other programs keep ")
        assert f"{min(running - 1, cores_there)} of {cores_there} cores busy (OMP_NUM_THREADS sets the number)" in line


def test_who_has_said_how_many(machine, monkeypatch):
    chosen = machine(cores_there=2, running=9)
    for options in (SimpleNamespace(resume=None, workers=2), SimpleNamespace(resume=None, threads=2)):
        assert cores.choose_threads(options) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cores.choose_threads(NEW) is None
    assert chosen == []


def test_a_system_that_does_not_tell(machine, tmp_path, monkeypatch):
    chosen = machine(cores_there=2, running=9)
    monkeypatch.setattr(cores, "STAT", tmp_path / "none")
    assert cores.choose_threads(NEW) is None
    assert chosen == []


def test_a_resumed_run_has_the_threads_that_it_began_with(machine, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for kept, running, usual, threads in ((1, 1, 2, [1]), (2, 9, 2, []), (None, 9, 2, []), (4, 1, 2, [])):
        (tmp_path / "environment.json").write_text(json.dumps({"threads": kept}))
        chosen = machine(cores_there=2, running=running, usual=usual)
        line = cores.choose_threads(SimpleNamespace(resume=str(tmp_path), workers=None))
        assert chosen == threads
        assert line == (
            "1 thread as the run began with, of 2 (OMP_NUM_THREADS sets another number)" if threads else None
        )


def test_waiting(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    _environment.wait_passively()
    assert [os.environ[name] for name in _environment.WAITING] == ["passive", "0", "1000"]
    for name in _environment.WAITING:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KMP_BLOCKTIME", "200")
    _environment.wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_it_is_set_before_torch_is_loaded():
    code = (
        "import os, sys\nfrom eggroll.cli import main\nassert 'torch' not in sys.modules\n"
        "main.main(['report', 'nowhere'])\nprint(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "passive False\n"


def test_a_run_keeps_the_number(eggroll):
    assert eggroll.tune("-g", "1", "-o", "run").status == 0
    found = json.loads((eggroll.work / "run/environment.json").read_text())
    assert found["threads"] == torch.get_num_threads()
