"""Countdown and the arithmetic under it: problems that can be solved, answers that are read and never run."""

import ast
import itertools
import random
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eggroll.errors import DataError, RewardError
from eggroll.llm.data.examples import load_examples
from eggroll.llm.rewards import FunctionReward
from eggroll.llm.tasks import get_task, row_check
from eggroll.llm.tasks.answers import format_score, last_block
from eggroll.llm.tasks.arithmetic import evaluate
from eggroll.llm.tasks.countdown import is_solution, problems

TASK = get_task("countdown")


def _joined(parts):
    """Two expressions and a sign: the text, the value by Fraction's own arithmetic (None: by zero), the numbers."""
    (left, a, first), sign, (right, b, second) = parts
    value = None
    if a is not None and b is not None and not (sign == "/" and b == 0):
        value = a / b if sign == "/" else {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"({left}) {sign}({right})", value, first + second


def _negated(made):
    return f"-({made[0]})", None if made[1] is None else -made[1], made[2]


NUMBERS = st.integers(0, 999).map(lambda number: (str(number), Fraction(number), [number]))
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: inner.map(_negated) | st.tuples(inner, st.sampled_from("+-*/"), inner).map(_joined),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_arithmetic_is_exact(made):
    text, value, numbers = made
    found = evaluate(text)
    if len(text) > 256 or value is None:
        assert found is None
    else:
        assert found == (value, numbers)


@given(st.text(max_size=60) | st.text("0123456789+-*/() .e_", max_size=40))
def test_arithmetic_accepts_only_what_python_reads_the_same_way(text):
    found = evaluate(text)
    if found is not None:
        allowed = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
        assert all(isinstance(node, allowed) for node in ast.walk(ast.parse(text.strip(), mode="eval")))
        assert float(found[0]) == pytest.approx(eval(text.strip(), {"__builtins__": {}}))


HOSTILE = [
    "__import__('os').system('touch pwned')",
    "9**9**9",
    "9**9**9**9**9**9",
    "(lambda: 0)()",
    "open('x')",
    "x",
    "1 if 1 else 2",
    "[1, 2]",
    "1_0",
    "0x10",
    "1e9",
    "1.5",
    "True",
    "None",
    "7//2",
    "7%2",
    "1<<99999",
    "~1",
    "1/0",
    "1/(2-2)",
    "()",
    "(1, 2)",
    "3(4)",
    "٣+٤",  # Arabic digits
    "１＋２",  # full-width
    "²",
    "1\x002",
    "",
    " ",
    "05",
    "1 2",
    "(" * 1_000_000,
    "(" * 100 + "1" + ")" * 100 + "\n" * 100 + "1",
    "(" * 500_000 + "1" + ")" * 500_000,
    "-" * 250 + "x",
    "1+" * 500_000 + "1",
    "9" * 1_000_000,
]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda text: repr(text[:24]))
def test_hostile_answers_are_no_arithmetic_and_score_nothing(answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(answer) is None
    row = TASK.test[0]
    score = TASK.reward(["p"], [f"<answer>{answer}</answer>"], numbers=[row["numbers"]], target=[row["target"]])
    assert score == [pytest.approx(0.05)]  # half of the format's 0.1, for the tags
    assert list(tmp_path.iterdir()) == []


def test_hostile_answers_take_no_time():
    """A thousandth of what computing one of them would take: a bound on work, not a measurement."""
    start = time.process_time()
    for answer in [*HOSTILE, "<answer>" * 100_000, "<think>" * 100_000 + "</answer>" * 100_000]:
        TASK.reward(["p"], [f"<think></think><answer>{answer}</answer>"], numbers=[[1, 2, 3]], target=[6])
    assert time.process_time() - start < 10


def test_deep_brackets_within_the_limit_do_not_crash():
    assert evaluate("(" * 90 + "7" + ")" * 90) == (7, [7])
    assert evaluate("-" * 200 + "7") in ((7, [7]), None)
    assert evaluate("(" * 127 + "7" + ")" * 127) in ((7, [7]), None)


def _reachable(numbers):
    """All values that the numbers can make, each used once: by trying everything."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in (a + b, a - b, a * b, *([a / b] if b else [])):
            found |= _reachable([*rest, value])
    return found


@given(st.integers(0, 2**32))
def test_problems_are_solvable_and_of_the_stated_kind(seed):
    for key, row in itertools.islice(problems(seed), 5):
        assert set(row) == {"prompt", "numbers", "target", "solution"}
        assert len(row["numbers"]) in (3, 4)
        assert all(1 <= number <= 99 for number in row["numbers"])
        assert 1 <= row["target"] <= 100
        assert is_solution(row["solution"], row["numbers"], row["target"])
        assert key == f"{sorted(row['numbers'])} -> {row['target']}"
        assert str(row["target"]) in row["prompt"]
        assert row["solution"] not in row["prompt"]


def test_an_exhaustive_solver_agrees():
    for row in random.Random(0).sample(TASK.train, 12):
        assert row["target"] in _reachable([Fraction(number) for number in row["numbers"]])


def test_problems_come_from_the_seed():
    assert list(itertools.islice(problems(5), 20)) == list(itertools.islice(problems(5), 20))
    assert list(itertools.islice(problems(5), 20)) != list(itertools.islice(problems(6), 20))
    # frozen: a run's results are those on these problems
    assert TASK.train[0]["numbers"] == [88, 18, 86]
    assert TASK.train[0]["target"] == 16


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("6 * 7 - 2", True),
        ("(7*6)-2", True),
        ("-2 + 6*7", True),
        ("6 * 7 - 1", False),  # another number
        ("6 * 7 - 2 + 2 - 2", False),  # one twice
        ("42 - 2", False),  # joined
        ("40", False),
        ("6 * 7 - 2 = 40", False),
        ("6 * 7", False),
    ],
)
def test_every_number_exactly_once(answer, right):
    assert is_solution(answer, [6, 7, 2], 40) is right


def test_fractions_are_exact():
    assert is_solution("8 / (3 - 8/3)", [8, 3, 8, 3], 24)
    assert not is_solution("(1/3) * 299999999999999999", [1, 3, 299999999999999999], 10**17)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think> <answer>b</answer>", 1.0),
        ("\n<think>a</think><answer>b</answer>\n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.6),
        ("Well, <think>a</think> <answer>b</answer>", 0.6),
        ("<think>a</think> <answer>b</answer> done", 0.6),
        ("<answer>b</answer> <think>a</think>", 0.6),
        ("<think>a<think>a</think> <answer>b</answer>", 0.6),
        ("<answer>b</answer>", 0.5),
        ("<think>a</think>", 0.1),
        ("<answer>b", 0.0),
        ("</answer>b<answer>", 0.0),
        ("b", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, score):
    assert format_score(text) == pytest.approx(score)


def test_the_last_answer_counts():
    assert last_block("<answer>1</answer> no, <answer> 2 </answer> <answer>3") == "2"
    assert last_block("<answer>1<answer>2</answer>") == "2"


def test_reward_in_the_form_of_trl():
    perfect = "<think>I see.</think>\n<answer>6 * 7 - 2</answer>"
    columns = {"numbers": [[6, 7, 2]] * 3, "target": [40] * 3}
    scores = TASK.reward(["p"] * 3, [perfect, "<answer>6*7-2</answer>", "40"], **columns, solution=["x"] * 3)
    assert scores == [pytest.approx(TASK.best), pytest.approx(1.05), 0.0]
    reply = [{"role": "assistant", "content": perfect}]
    assert TASK.reward([[]], [reply], nums=[[6, 7, 2]], target=[40]) == [pytest.approx(1.1)]
    with pytest.raises(RewardError, match='the reward "countdown" needs a column "target"'):
        TASK.reward(["p"], [perfect], numbers=[[6, 7, 2]])


@pytest.mark.parametrize(
    ("numbers", "target"),
    [
        ([6, 7, 2], "40"),
        (["6", " 7", "2.0"], 40.0),
        ("[6, 7, 2]", "40"),
        ("6 7 2", " +40 "),
        ((np.int64(6), 7.0, 2), np.float32(40)),
    ],
)
def test_numbers_that_a_file_holds_as_text_are_numbers(numbers, target):
    assert TASK.reward(["p"], ["<answer>6 * 7 - 2</answer>"], numbers=[numbers], target=[target])[0] > 1


@pytest.mark.parametrize(
    ("numbers", "target", "text"),
    [
        ([6, 7, 2], "forty", "target (='forty') must be a whole number, as in "),
        ([6, 7, 2], 40.5, "target (=40.5) must be a whole number"),
        ([6, 7, 2], None, "target (=None) must be a whole number"),
        ([6, 7, 2], True, "target (=True) must be a whole number"),
        ([6, 7, 2], "٤٠", "target (='٤٠') must be a whole number"),
        ([6, "x", 2], 40, "numbers (=[6, 'x', 2]) must be a list of whole numbers, as in "),
        ([], 40, "numbers (=[]) must be a list of whole numbers"),
        ("", 40, "numbers (='') must be a list of whole numbers"),
        (7, 40, "numbers (=7) must be a list of whole numbers"),
    ],
)
def test_what_is_no_number_is_refused(numbers, target, text):
    reward = FunctionReward(TASK.reward)
    with pytest.raises(DataError) as info:
        reward.score(["p"], ["<answer>6 * 7 - 2</answer>"], {"numbers": [numbers], "target": [target]})
    assert str(info.value).startswith(text)


def test_the_row_of_a_file_that_cannot_be_scored_is_named(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "nums": "6 7 2", "target": "40"}\n{"prompt": "b", "nums": [6], "target": "4O"}\n')
    with pytest.raises(DataError) as info:
        load_examples(file, check=row_check("countdown"))
    assert str(info.value).startswith(f"data set {file}, row 2: target (='4O') must be a whole number")
    assert row_check(None) is row_check("zeros") is row_check("no such task") is None
