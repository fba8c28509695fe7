"""Workers with several GPUs: each has a placement group of its own, which goes when it goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_each_worker_holds_a_group_of_its_own():
    """Disjoint GPUs on one node or several, freed with a killed worker and at the end; the weights are the same."""
    pytest.importorskip("ray")
    script = Path(__file__).with_name("group_script.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wanted = ["one node: the same weights", "too large: said", "across nodes: one bundle for each GPU"]
    said = [line for line in done.stdout.splitlines() if line in wanted]  # Ray prints lines of its own in between
    assert (done.returncode, said) == (0, wanted), done.stdout + done.stderr
