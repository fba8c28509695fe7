"""What is wrong with a command line is said in order (reward, model, data), before anything is loaded."""

import re

import pytest

from eggroll.errors import DataError
from eggroll.llm.backends import build
from eggroll.llm.data.examples import load_examples
from eggroll.llm.tasks import row_check


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Nothing here gets as far as a model's weights."""
    monkeypatch.setattr(build, "load", lambda *_, **__: pytest.fail("the model was loaded"))


def said(done, *texts):
    assert done.status == 1, done.err + done.out
    for text in texts:
        assert text in done.err
    assert done.err.count("error: ") == 1
    return done.err


def test_everything_that_is_missing_is_named_in_order(eggroll):
    err = said(eggroll("tune", "./tinny", "-r", "x.py", "-d", "nofile.txt", "--eval-prompts", "gone.jsonl"))
    places = [
        err.index(text)
        for text in (
            "eggroll tune has 4 problems:",
            "reward file x.py does not exist. Python files in .: score.py",
            "model directory tinny does not exist. Near matches in .: tiny",
            "data set nofile.txt does not exist. In . there is: ",
            "data set gone.jsonl does not exist. In . there is: ",
        )
    ]
    assert places == sorted(places)


def test_a_reward_that_is_missing_comes_before_data_that_were_not_given(eggroll):
    assert "wikitext" not in said(eggroll("tune", "tiny", "-r", "x.py"), "error: reward file x.py does not exist.")
    assert "wikitext" not in said(eggroll("tune", "./tinny", "-r", "score.py"), "error: model directory tinny does not")
    said(eggroll("tune", "tiny", "-r", "score.py"), "--reward score.py needs prompts to answer: give --prompts")


def test_all_files_that_could_be_meant(eggroll):
    (eggroll.work / "prompt.csv").write_text("prompt\na\n")
    said(
        eggroll("tune", "tiny", "-r", "score.py", "-d", "prompt.txt"),
        "data set prompt.txt does not exist. In . there is: prompts.txt, prompt.csv, texts.txt, held.txt",
    )
    said(
        eggroll("tune", "tiny", "-r", "score.py", "-d", "nofile.txt"),
        "data set nofile.txt does not exist. In . there is: ",
        "held.txt",
        "prompts.txt",
        "texts.txt",
    )


@pytest.mark.parametrize("data", [(), ("-d", "texts.txt"), ("--prompts", "prompts.txt")])
def test_a_forgotten_reward(eggroll, data):
    """It was perplexity, without a word."""
    said(
        eggroll("tune", "tiny", *data),
        "error: eggroll tune needs --reward, which says what is scored: a .py file, ",
        "perplexity for how likely it finds the texts of --dataset; or --task NAME",
    )
    assert not (eggroll.work / "runs").exists()


@pytest.mark.parametrize(
    ("source", "asked", "there"),
    [
        ("def reward(prompts, completions, answer): ...", "answer", "level, prompts, completions"),
        ("def reward(completions, answer, hint, **columns): ...", "answer, hint", "level, prompts, completions"),
        ("def score(text, answer, level=1): ...", "answer", "level, prompt"),
        ("async def reward(completions, answer): ...", "answer", "level, prompts, completions"),
    ],
)  # fmt: skip
def test_a_missing_column(eggroll, source, asked, there):
    (eggroll.work / "own.py").write_text(source + "\n")
    (eggroll.work / "rows.jsonl").write_text('{"prompt": "a", "level": 1}\n')
    (eggroll.work / "good.jsonl").write_text('{"prompt": "a", "answer": "b", "hint": "c"}\n')
    text = f"asks for {asked}; there are {there}. Add the column to "
    said(eggroll("tune", "tiny", "-r", "own.py", "-d", "rows.jsonl"), text + "the data set, or give the parameter a")
    arguments = ("-d", "good.jsonl", "--eval-prompts", "rows.jsonl")
    said(eggroll("tune", "tiny", "-r", "own.py", *arguments), text + "the held-out data set")
    assert not (eggroll.work / "runs").exists()


def test_a_missing_column_of_a_task(work):
    (work / "rows.jsonl").write_text('{"prompt": "a", "level": 1}\n')
    message = re.escape(
        'data set rows.jsonl, row 1: the task "gsm8k" needs a column "answer", as in {"prompt": "...", "answer": "72"}'
        "; there are ['level']"
    )
    with pytest.raises(DataError, match=message):
        load_examples("rows.jsonl", check=row_check("gsm8k"))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def score(text):\n    return (\n", "reward file own.py is not valid Python, line 2: "),
        ("raise KeyError('key')\n", "reward file own.py raised KeyError at line 1 while it was loaded: 'key'"),
        ("def evaluate(x): ...\n", "reward file own.py has no reward function; functions in it: evaluate."),
    ],
)
def test_a_reward_file_that_cannot_be_used(eggroll, source, text):
    (eggroll.work / "own.py").write_text(source)
    said(eggroll("tune", "tiny", "-r", "own.py", "--prompts", "prompts.txt"), text)


@pytest.mark.parametrize("given", [(), ("--prompts", "prompts.txt"), ("--shots", "2")])
def test_a_suite_is_not_trained_on(eggroll, given):
    """It is said before its problems are looked for."""
    said(
        eggroll("tune", "tiny", "--task", "math500", *given),
        "error: math500 is there to evaluate on: it has no training problems",
        "Train on another task (--task gsm8k), or on problems of your own with an answer each (--reward math500 --prom",
    )
