"""What ``eggroll.llm`` offers, and that asking for it loads nothing before it is used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

# A name here is a promise to users: none may go, and a new one is added here on purpose.
PUBLIC = [
    "CodeExecutionReward",
    "CustomReward",
    "EggrollConfig",
    "EggrollTrainer",
    "Example",
    "FunctionReward",
    "JudgeReward",
    "LoadedModel",
    "MultiReward",
    "PerplexityReward",
    "Reward",
    "Task",
    "TextReward",
    "Turn",
    "World",
    "WorldReward",
    "get_task",
    "load",
    "load_examples",
]


def test_public_names():
    llm = importlib.import_module("eggroll.llm")
    assert sorted(llm.__all__) == dir(llm) == PUBLIC
    assert all(getattr(llm, name).__name__ == name for name in PUBLIC)
    with pytest.raises(AttributeError, match=r"module 'eggroll.llm' has no attribute 'laod'"):
        _ = llm.laod


def test_the_package_and_a_task_load_no_torch():
    code = "import sys; from eggroll.llm import get_task\n"
    code += "assert not {'torch', 'transformers', 'datasets'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
