"""Real crashes in real processes: SIGKILL at any moment, a full disk, a limit on the size of files."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("crash_script.py")

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork and POSIX signals")


def run_script(mode, path, *, inside=None):
    command = [sys.executable, str(SCRIPT), mode, str(path)]
    if inside is not None:
        command = [*inside, shlex.join(command)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kill_9_at_random_moments_loses_at_most_the_running_generation(tmp_path):
    times = int(run_script("kill", tmp_path / "run").removeprefix("killed ").split()[0])
    assert times >= 40


def test_a_crash_before_every_single_system_call_loses_at_most_the_running_generation(tmp_path):
    assert "crashed before each of" in run_script("steps", tmp_path)


def test_a_full_disk_is_explained_and_loses_nothing(tmp_path):
    mount = f"mount -t tmpfs -o size=300k tmpfs {shlex.quote(str(tmp_path))}"
    inside = ["unshare", "-rm", "sh", "-c"]  # a mount of its own, gone with the process
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    inside = ["unshare", "-rm", "sh", "-c", f'{mount} && eval "$0"']
    output = run_script("full", tmp_path, inside=inside)
    assert "free some space, then continue with --resume" in output


def test_a_limit_on_the_size_of_files_is_explained_and_loses_nothing(tmp_path):
    assert "raise the limit (ulimit -f), then continue with --resume" in run_script("limit", tmp_path / "run")
