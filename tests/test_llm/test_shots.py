"""Worked examples before each problem: what is shown, what stays out of training, what is refused."""

import pytest

from eggroll.errors import ConfigError
from eggroll.llm.generation.chat import plain_text
from eggroll.llm.tasks import countdown, get_task, gsm8k
from eggroll.llm.tasks.arithmetic import evaluate, steps
from eggroll.llm.tasks.countdown import is_solution
from eggroll.llm.tasks.splits import SPLITS
from eggroll.llm.tasks.task import Task, with_shots

PLAIN = get_task("countdown")
SHOWN = get_task("countdown", shots=3)


def test_every_problem_comes_after_the_same_worked_examples():
    examples = SHOWN.train[0]["prompt"][:-1]
    assert [turn["role"] for turn in examples] == ["user", "assistant"] * 3
    for split in SPLITS:
        rows = getattr(SHOWN, split)
        assert rows
        assert all(row["prompt"][:-1] == examples for row in rows)
        assert all(row["prompt"][-1]["content"].startswith("Numbers: ") for row in rows)
    assert SHOWN.settings["max_length"] > 512  # room for the examples
    assert (SHOWN.system, SHOWN.max_tokens) == (countdown.SHOTS_SYSTEM, countdown.SHOTS_MAX_TOKENS)
    assert plain_text(SHOWN.train[0]["prompt"]) == SHOWN.train[0]["prompt"][-1]["content"]


def test_examples_are_answers_with_the_full_reward_and_nobody_trains_on_them():
    held_back = PLAIN.train[-3:]
    assert [row["solution"] for row in SHOWN.train] == [row["solution"] for row in PLAIN.train[:-3]]
    answers = [turn["content"] for turn in SHOWN.train[0]["prompt"] if turn["role"] == "assistant"]
    numbers, targets = ([row[key] for row in held_back] for key in ("numbers", "target"))
    assert SHOWN.reward([""] * 3, answers, numbers=numbers, target=targets) == pytest.approx([1.1] * 3)
    assert "= " in answers[0].split("</think>")[0]


def test_the_steps_of_a_solution_are_right():
    assert steps("94 - ((44 / 2) + 9)") == ["44 / 2 = 22", "22 + 9 = 31", "94 - 31 = 63"]
    for row in PLAIN.train[:50]:
        *_, end = steps(row["solution"])
        assert end.endswith(f" = {row['target']}")
        assert is_solution(row["solution"], row["numbers"], row["target"])
        for step in steps(row["solution"]):
            left, right = step.split(" = ")
            assert evaluate(left)[0] == int(right)


def test_gsm8k_shows_the_reasoning_without_the_calculator_and_the_number_in_a_box():
    row = {"prompt": "How many?", "answer": "72", "solution": "48/2 = 24 clips.\nThe answer is \\boxed{72}."}
    task = Task("gsm8k", "", gsm8k.reward, [row] * 3, [row], [row], 8, test=[row])
    shown = with_shots(task, gsm8k, 1)
    assert len(shown.train) == 2
    assert shown.system is None
    assert shown.test[0]["prompt"] == [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": row["solution"]},
        {"role": "user", "content": "How many?"},
    ]


def test_gsm8k_with_the_real_rows(data_dir):
    if not (data_dir / "gsm8k" / "test.jsonl.gz").exists():
        pytest.skip(f"{data_dir} has no gsm8k/test.jsonl.gz")
    task = get_task("gsm8k", shots=2)
    answers = [turn["content"] for turn in task.train[0]["prompt"] if turn["role"] == "assistant"]
    golds = [row["answer"] for row in get_task("gsm8k").train[-2:]]
    assert task.reward([""] * 2, answers, answer=golds) == pytest.approx([1.1, 1.1])
    assert "<<" not in "".join(answers)


def test_no_examples_is_the_task_itself():
    assert get_task("countdown", shots=0) is get_task("countdown")


@pytest.mark.parametrize("shots", [-1, 17])
def test_too_many_examples_are_refused(shots):
    with pytest.raises(ConfigError, match=rf"shots \(={shots}\) must be from 0 to 16 worked examples"):
        get_task("countdown", shots=shots)


@pytest.mark.parametrize("name", ["zeros", "one_sentence"])
def test_tasks_without_worked_answers_say_which_have_some(name):
    with pytest.raises(ConfigError) as info:
        get_task(name, shots=1)
    assert str(info.value) == (
        f"shots (=1): the task {name} has no worked answers to show; countdown and gsm8k have. Conversations in a "
        ".jsonl file (--prompts) can show any example"
    )
