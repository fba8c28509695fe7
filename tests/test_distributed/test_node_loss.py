"""A node that is lost takes the only worker with it, and the checkpoint that new ones would start from."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_lost_node_costs_time_and_nothing_else():
    pytest.importorskip("ray")
    script = Path(__file__).with_name("node_script.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["the same weights"]), done.stdout + done.stderr
