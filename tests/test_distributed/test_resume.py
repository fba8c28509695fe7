"""A driver that is killed, and one that is asked to stop, continue as if nothing had happened."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eggroll.distributed import evolve
from eggroll.run.run_dir import RunDir

SCRIPT = Path(__file__).with_name("driver_script.py")


def start(directory, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(SCRIPT), str(directory), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for(generation, log, process):
    """Until a worker begins a range of this generation; returns the workers that have been seen."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        if any(int(number) == generation for number, _ in lines):
            return {int(pid) for _, pid in lines}
        time.sleep(0.005)
    raise AssertionError(f"generation {generation} was never begun: {process.communicate(timeout=10)}")


def gone(pids):
    deadline = time.monotonic() + 60
    while pids and time.monotonic() < deadline:
        for pid in list(pids):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                    continue
            pids.discard(pid)
        time.sleep(0.05)
    return not pids


@pytest.mark.slow
def test_a_killed_driver_and_a_stopped_one_lose_nothing(toys, tmp_path):
    pytest.importorskip("ray")
    settings = toys.config()
    whole = evolve(toys.NumpyWorker, settings, local=True, run=tmp_path / "whole", heldout=True, checkpoint_every=3)
    directory, log = tmp_path / "run", tmp_path / "log"

    process = start(directory)
    workers = wait_for(4, log, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert 3 <= len(RunDir.open(directory).updates()) <= 5
    assert gone(workers), "workers do not outlive their driver"

    log.unlink()
    process = start(directory, "resume")
    workers = wait_for(7, log, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "interrupted ray is down\n"), err
    assert err == "", "Ray says nothing"
    run = RunDir.open(directory)
    assert run.latest_checkpoint().generation == len(run.updates()) < 10
    assert gone(workers)

    process = start(directory, "resume")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "done ray is down\n", "")
    run, other = RunDir.open(directory), RunDir.open(tmp_path / "whole")
    assert (run.path / "updates.jsonl").read_bytes() == (other.path / "updates.jsonl").read_bytes()
    state = run.latest_checkpoint().load()
    assert list(state) == list(whole.state)
    assert all(torch.equal(state[name], whole.state[name]) for name in state)
