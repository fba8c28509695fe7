"""The digests of the fastest runs are those that were recorded; ``digests.py --check`` compares all of them."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from parity.digests import FILE, differing
from parity.runs import BY_NAME, make

RECORDED = json.loads(FILE.read_text())
WHOLE = [name for name, run in BY_NAME.items() if run.whole]
FLOATING = ["tune_adam", "recipe_cartpole", "pretrain_fp32"]


def test_every_run_is_recorded():
    assert list(RECORDED["runs"]) == list(BY_NAME)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_the_same_everywhere(name, tmp_path):
    found = make(BY_NAME[name], tmp_path)
    recorded = dict(RECORDED["runs"][name])
    del found["heldout"], recorded["heldout"]  # logarithms in floating point
    assert found == recorded


@pytest.mark.slow
def test_floating_point_is_the_same_on_the_same_machine():
    """In a process of its own, with the number of threads that was recorded with."""
    other = differing(RECORDED["facts"])
    if other:
        pytest.skip(f"the digests were recorded on another kind of machine: {'; '.join(other)}")
    only = [word for name in FLOATING for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, FILE.with_name("digests.py"), "--check", *only],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
