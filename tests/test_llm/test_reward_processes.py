"""A reward that starts processes: they import its file, or its module, by name."""

import sys

import pytest

from eggroll.llm.rewards import load_reward

HELPER = """
from dataclasses import dataclass

@dataclass
class Points:
    value: float
"""
SCORE = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from reward_helper_of_a_test import Points

def points(text):
    return Points(float(len(text)))

def reward(completions, **columns):
    from later_helper_of_a_test import BONUS
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [BONUS + found.value for found in pool.map(points, completions)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "reward_helper_of_a_test.py").write_text(HELPER)
    (tmp_path / "later_helper_of_a_test.py").write_text("BONUS = 0.5\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_of_a_test") or name.startswith("eggroll_reward_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["json.py", "my.score-2.py"])  # the first is also the name of a known module
def test_a_reward_file_with_spawned_processes(folder, name):
    (folder / name).write_text(SCORE)
    assert load_reward(str(folder / name), None).score(["p", "p"], ["a", "bcd"]) == [1.5, 3.5]


def test_a_module_in_the_current_folder_with_spawned_processes(folder, monkeypatch):
    (folder / "module_of_a_test.py").write_text(SCORE)
    monkeypatch.chdir(folder)
    assert load_reward("module_of_a_test:reward", None).score(["p"], ["abc"]) == [3.5]
