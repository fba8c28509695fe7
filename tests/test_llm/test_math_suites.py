"""Suites of mathematical problems: files of the hub's form, math-verify within limits, and no training on them."""

import json
import re
import time

import pytest

from eggroll.errors import ConfigError, DataError, RewardError
from eggroll.llm import tasks
from eggroll.llm.measure.evaluate import draw_problems
from eggroll.llm.tasks.math_answers import is_harmless, same
from eggroll.llm.tasks.math_suites import SUITES

pytest.importorskip("math_verify", reason="math-verify is not installed")

# Rows as the hub's data sets have them, with problems of our own.
ROWS = {
    "math500": {"problem": "What is $1/2$?", "solution": "Half.", "answer": "\\frac{1}{2}", "subject": "Algebra",
                "level": 1, "unique_id": "test/1.json"},
    "aime24": {"id": 60, "problem": "What is $73$?", "solution": "It is.", "answer": "073", "url": "x", "year": "2024"},
    "aime25": {"problem": "What is $70$?", "answer": "70", "id": "0"},
    "amc": {"id": 0, "problem": "What is $142$?", "answer": 142.0, "url": "x"},
    "minerva": {"question": "How many?", "answer": "4.5e33"},
    "olympiad": {"id": 1606, "question": "Which two?", "solution": ["So."], "final_answer": ["$2$", "$-3$"],
                 "context": None, "image_1": None, "modality": "Text-only", "is_multiple_answer": True, "unit": None,
                 "answer_type": "Numerical", "error": None, "question_type": "Open-ended"},
}  # fmt: skip
RIGHT = {"math500": "0.5", "aime24": "73", "aime25": "70", "amc": "142", "minerva": r"4.5 \times 10^{33}",
         "olympiad": "-3, 2"}  # fmt: skip
GOLD = {
    "math500": "\\frac{1}{2}",
    "aime24": "073",
    "aime25": "70",
    "amc": "142",
    "minerva": "4.5e33",
    "olympiad": "2, -3",
}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("EGGROLL_DATA_DIR", str(tmp_path))
    tasks._task.cache_clear()
    yield tmp_path
    tasks._task.cache_clear()


def write(path, row):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    else:
        path.write_text(f"{json.dumps(row)}\n" * 2)


@pytest.mark.parametrize("form", ["{}.jsonl", "{}.parquet", "{}/{}-00000-of-00001.parquet"])
@pytest.mark.parametrize("name", SUITES)
def test_files_of_the_hubs_form(name, form, data):
    write(data / form.format(name, SUITES[name].split), ROWS[name])
    task = tasks.get_task(name)
    assert (len(task.test), task.train, task.validation, task.heldout) == (2, [], [], [])
    row = task.test[0]
    problem = ROWS[name].get("problem") or ROWS[name]["question"]
    assert row["prompt"] == f"{problem}\nThink step by step, and end with the final answer in \\boxed{{}}."
    assert row["answer"] == GOLD[name]
    answers = [f"So it is \\boxed{{{RIGHT[name]}}}.", "So it is \\boxed{41}.", "", "\\boxed{"]
    assert task.reward([row["prompt"]] * 4, answers, answer=[row["answer"]] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert len(draw_problems(task, None, 0)) == 2


def test_what_is_missing_is_said(data, monkeypatch):
    message = "the task aime25 needs its problems: "
    with pytest.raises(DataError, match=message) as info:
        tasks.get_task("aime25")
    assert "Set EGGROLL_DATA_DIR to a folder that holds aime25.jsonl or aime25.parquet (from the hub's" in str(
        info.value
    )
    write(data / "aime25.jsonl", {"problem": "1?", "solution": "no answer"})
    with pytest.raises(
        DataError, match=re.escape("aime25.jsonl has no answer or final_answer, or no problem in words")
    ):
        tasks.get_task("aime25")
    write(data / "amc.jsonl", ROWS["amc"])
    with pytest.raises(RewardError, match='the reward "amc" needs a column "answer"'):
        tasks.get_task("amc").reward(["p"], ["1"])
    with pytest.raises(ConfigError, match="the task amc has no worked answers to show"):
        tasks.get_task("amc", shots=1)
    with pytest.raises(DataError, match='the reward needs a column "answer"'):
        tasks.row_check("amc")({"prompt": "1?"})


def test_none_is_trained_on():
    for name in SUITES:
        with pytest.raises(ConfigError, match=f"{name} is there to evaluate on: it has no training problems"):
            tasks.check_trainable(name)
    tasks.check_trainable("gsm8k")
    tasks.check_trainable(None)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"(3, \infty)", r"(3,\infty)"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
        ("A", r"\text{(A)}"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        ("2, 1", "1,2"),
        (r"\text{ Evelyn }", r"\text{Evelyn}"),
        ("90", r"90^\circ"),
        ("10,080", "10080"),
        ("2^{2021}", "2^{2021}"),
        (r"\frac13", r"\dfrac{1}{3}"),
        (r"1 \frac{1}{2}", "1.5"),
    ],
)
def test_the_same(answer, gold):
    assert same(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("4", "3"), ("x^3", "x^2"), ("(2,1)", "(1,2)"), ("[0,3]", "[0,3)"), ("1 2", "12"), ("1 1/2", "11/2"), ("", "1")],
)
def test_not_the_same(answer, gold):
    assert not same(answer, gold)


HOSTILE = ["9^{9^{9}}", "9^9^9", "(9^{99})^{99}", r"\left(\left(9^{99}\right)^{99}\right)^{99}", "1000000!", "(9)!",
           "{9^{999}}^{999}", "(x+y)^{999}", "((a+b+c)^{99}+(c+d)^{99})(e+f+g)^{99}", r"\sum_{n=1}^{1000000} n",
           "9**9**9", r"\prod_{n=1}^{9999} n", "(" * 50, "9" * 5000, "1/" * 100 + "1", r"\frac{1}{" * 60,
           r"\binom{99999}{500}",
           "9^{9999999}", "x^{" + "1" * 200 + "}", "{" * 300 + "}" * 300]  # fmt: skip


def test_hostile_answers_are_wrong_unread():
    start = time.process_time()
    for answer in HOSTILE:
        assert not is_harmless(answer), answer
        assert not same.__wrapped__(answer, "72"), answer
    assert time.process_time() - start < 2
