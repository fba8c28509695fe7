"""Conversations with worlds on the command line: tune, resume, eval, and worlds of a user's own."""

import json
import re

import pytest

WORLD = '''
from eggroll.llm import Turn, World

class Letters(World):
    """Counts letters."""

    @staticmethod
    def rows():
        return {"train": [{"n": n} for n in range(6)], "heldout": [{"n": 7}]}

    def reset(self, row):
        self.turns = 0
        return f"Write {row['n']} letters."

    def step(self, completion):
        self.turns += 1
        return Turn("More!", done=self.turns == 2, score=-sum(map(ord, completion)) % 97)
'''
ENVIRONMENT = '''
class Counter:
    """As for a GRPOTrainer."""

    def reset(self, **row):
        self.count = 0

    def add(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: How much.
        """
        self.count += step
        return self.count

    def get_reward(self):
        return float(self.count)
'''
TUNE = ["tune", "tiny", "-p", "4", "--rank", "1", "--max-tokens", "4", "--batch-size", "2", "--dtype", "float32"]
TUNE += ["--sigma", "0.05", "--report-to", "none"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_task_with_a_world_is_tuned_and_measured(eggroll):
    (eggroll.work / "held.jsonl").write_text('{"prompt": "Guess from 1 to 50.", "high": 50, "number": 7}\n')
    done = eggroll(*TUNE, "--task", "guess_number", "-g", "1", "--eval-prompts", "held.jsonl", "-o", "run")
    assert done.status == 0, done.err
    options = json.loads((eggroll.work / "run" / "config.json").read_text())["options"]
    assert (options["max_turns"], options["world_failure_score"]) == (5, 0.0)
    sample = lines(eggroll.work / "run" / "samples.jsonl")[0]
    assert [message["role"] for message in sample["completion"]] == ["assistant", "user"] * 5
    assert sample["logged"] == {"turns": 5, "end": "done"}
    assert lines(eggroll.work / "run" / "metrics.jsonl")[-1]["worlds/turns"] == 5.0
    assert "user: " in (eggroll.work / "run" / "report.html").read_text()
    done = eggroll(
        "eval",
        "tiny",
        "--task",
        "guess_number",
        "--problems",
        "3",
        "--dtype",
        "float32",
        "--max-turns",
        "2",
        "-o",
        "e.json",
    )
    assert done.status == 0, done.err
    answers = json.loads((eggroll.work / "e.json").read_text())["problems"][0]["answers"][0]
    assert len(answers["completion"]) == 4


def test_a_world_of_ones_own_is_resumed_with_its_file_unchanged(eggroll):
    file = eggroll.work / "letters.py"
    file.write_text(WORLD)
    done = eggroll(*TUNE, "--world", "letters.py:Letters", "-g", "2", "-o", "whole")
    assert done.status == 0, done.err
    assert "reward Letters, 6 prompts" in done.out
    eggroll(*TUNE, "--environment", "letters.py", "-g", "1", "-o", "parts")
    done = eggroll("tune", "--resume", "parts", "-g", "2")
    assert done.status == 0, done.err
    scores = [
        [line.get("fitness_mean") for line in lines(eggroll.work / run / "metrics.jsonl")] for run in ("whole", "parts")
    ]
    assert scores[0] == scores[1]
    file.write_text(WORLD + "# changed\n")
    refused = eggroll("tune", "--resume", "parts", "-g", "3")
    assert refused.status == 1
    assert "world" in refused.err


def test_an_environment_of_trl_is_a_world_too(eggroll):
    (eggroll.work / "counter.py").write_text(ENVIRONMENT)
    arguments = ("--world", "counter.py:Counter", "--prompts", "prompts.txt", "-g", "1", "--max-length", "2000")
    done = eggroll(*TUNE, *arguments, "-o", "run")
    assert done.status == 0, done.err
    assert lines(eggroll.work / "run" / "samples.jsonl")[0]["reward"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "no.py:World"], "--world no.py:World: there is no file no.py"),
        (["--world", "letters.py:Other"], "has no class 'Other' with a method reset; it has Letters. A world is"),
        (["--world", "counter.py"], "--world counter.py needs rows to begin conversations with: give --prompts"),
        (["--world", "letters.py", "--task", "maze"], "the reward brings a world of its own, maze; give one world"),
        (["--world", "letters.py", "--max-turns", "0"], "max_turns (=0) must be a whole number of at least 1"),
    ],
)  # fmt: skip
def test_worlds_that_cannot_be_used(eggroll, arguments, message):
    (eggroll.work / "letters.py").write_text(WORLD)
    (eggroll.work / "counter.py").write_text(ENVIRONMENT)
    done = eggroll(*TUNE, *arguments, "-g", "1")
    assert done.status == 1
    assert message in re.sub(r"\s+", " ", done.err)
