r"""Suites of mathematical problems to evaluate models on: MATH-500, AIME, AMC, Minerva and OlympiadBench.

    reward = 1 if the answer is the right one, else 0

The answer is the last ``\boxed{...}``; without one, what follows the last ``####``, or the last number of the text.
math_answers.py says when two answers are the same.

None of them is bundled. A suite comes from ``EGGROLL_DATA_DIR`` (``NAME.jsonl``, ``NAME.parquet`` or a folder ``NAME``
of such files, in the form that the hub has it) or from the hub. They have test problems only: a model that was trained
on them could not be measured by them any more, so ``eggroll tune`` refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eggroll._environment import DATA, data_directory
from eggroll._optional import require
from eggroll.errors import ConfigError, DataError
from eggroll.llm.tasks.answers import column, text_of
from eggroll.llm.tasks.gsm8k import extract
from eggroll.llm.tasks.math_answers import same
from eggroll.llm.tasks.splits import Row
from eggroll.llm.tasks.task import Task

__all__ = ["SUITES", "Suite", "check", "refuse_training", "task"]

MAX_TOKENS = 1024
MAX_LENGTH = 2048
ANSWERS = ("answer", "final_answer")
"""Columns that hold the right answer; a list of them are all to be given."""
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_PROMPT = "{question}\nThink step by step, and end with the final answer in \\boxed{{}}."
_EXAMPLE = '{"prompt": "...", "answer": "\\\\frac{1}{2}"}'


@dataclass(frozen=True)
class Suite:
    """Where a suite's problems are.

    Attributes:
        title: its name as texts have it.
        hub: the data set's id, ``name`` or ``name:config``.
        split: of the data set.
        size: problems that it has there.
    """

    title: str
    hub: str
    split: str
    size: int


SUITES = {
    "aime24": Suite("AIME 2024", "HuggingFaceH4/aime_2024", "train", 30),
    "aime25": Suite("AIME 2025", "math-ai/aime25", "test", 30),
    "amc": Suite("AMC 12 of 2022 and 2023", "AI-MO/aimo-validation-amc", "train", 83),
    "math500": Suite("MATH-500", "HuggingFaceH4/MATH-500", "test", 500),
    "minerva": Suite("Minerva's problems of university courses", "math-ai/minervamath", "test", 272),
    "olympiad": Suite("OlympiadBench, mathematics in English without pictures",
                      "Hothan/OlympiadBench:OE_TO_maths_en_COMP", "train", 674),
}  # fmt: skip


def task(name: str) -> Task:
    """A suite as a task: all of its problems are ``test``.

    Raises:
        MissingExtraError: math-verify is not installed.
        DataError: the suite is neither here nor on the hub, or not of the form that it has there.
    """
    require("math_verify", extra="tasks")
    return Task(
        name=name,
        description=f"{SUITES[name].title}: solve a problem; the answer is a number or a term.",
        reward=partial(_reward, name),
        train=[],
        validation=[],
        heldout=[],
        test=_problems(name),
        max_tokens=MAX_TOKENS,
        settings={"max_length": MAX_LENGTH},
    )


def check(columns: Mapping[str, Any]) -> None:
    """Find out that a row of a data set cannot be scored, before anything is scored.

    Raises:
        DataError: it has no right answer.
    """
    if columns.get("answer") is None:
        raise DataError(f'the reward needs a column "answer", as in {_EXAMPLE}; there are {sorted(columns)}')


def refuse_training(name: str) -> None:
    """Refuse to train on a suite.

    Raises:
        ConfigError: always; the message says what to do instead.
    """
    raise ConfigError(
        f"{name} is there to evaluate on: it has no training problems, and it could not measure a model that was "
        "trained on its own. Train on another task (--task gsm8k), or on problems of your own with an answer each "
        f"(--reward {name} --prompts FILE), and compare: eggroll eval MODEL RUN/model --task {name}"
    )


def _reward(
    name: str, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any] | None = None, **_: Any
) -> list[float]:
    golds = column(name, answer, "answer", _EXAMPLE)
    return [
        1.0 if _is_right(text_of(text), _gold(gold)) else 0.0 for text, gold in zip(completions, golds, strict=True)
    ]


def _is_right(text: str, gold: str) -> bool:
    found = extract(text)
    return found is not None and same(found, gold)


def _gold(value: Any) -> str:
    """A data set's answer as text: ``142.0`` is ``142``, and several answers stand side by side."""
    if isinstance(value, list | tuple):
        return ", ".join(_gold(part).strip("$") for part in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _problems(name: str) -> list[Row]:
    from eggroll.llm.data.examples import load_examples

    suite, source = SUITES[name], _source(name)
    try:
        examples = load_examples(source, split=suite.split)
    except DataError as error:
        reason = str(error).partition(". A configuration")[0]  # the rest is how to name another data set
        raise DataError(
            f"the task {name} needs its problems: {reason}. Set {DATA} to a folder that holds {name}.jsonl or "
            f"{name}.parquet (from the hub's {suite.hub}), or let it be loaded once from the hub"
        ) from error
    rows = []
    for number, example in enumerate(examples, start=1):
        found = next((example.columns[key] for key in ANSWERS if example.columns.get(key) not in (None, "", [])), None)
        if found is None or not isinstance(example.prompt, str):
            raise DataError(
                f"the task {name}: row {number} of {source} has no {' or '.join(ANSWERS)}, or no problem in words; its "
                f"columns are {sorted(example.columns)}. It must have the form of the hub's {suite.hub}"
            )
        rows.append({"prompt": _PROMPT.format(question=example.prompt.strip()), "answer": _gold(found)})
    return rows


def _source(name: str) -> str | Path:
    folder = data_directory()
    if folder is None:
        return SUITES[name].hub
    files = [folder / f"{name}{ending}" for ending in ENDINGS]
    return next((path for path in (*files, folder / name) if path.exists()), SUITES[name].hub)
