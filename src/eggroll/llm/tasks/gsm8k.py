r"""The task ``gsm8k``: grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168), each with a number as answer.

    reward = 0.1 * format + answer                  from 0 to 1.1

    format   1 if the completion has exactly one \boxed{...} with something in it, else 0
    answer   1 if the answer equals the gold number, computed exactly or as math-verify decides, else 0

The answer is the last ``\boxed{...}``; without one, what follows the last ``####`` on its line; without that, the last
number of the text. Units, currency signs and thousands separators do not count. What math-verify gets is short and has
few divisions and no powers, factorials or other commands than fractions and products, since computing those could take
forever.

The problems come from the folder ``gsm8k`` in ``EGGROLL_DATA_DIR`` (``train.jsonl`` and ``test.jsonl``, also with
``.gz``) or from the hub (``openai/gsm8k``). ``test`` is the official test set, of 1,319; the official training set is
cut by the hash of the question into train, validation and held-out, and a question of the test set is left out of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from eggroll._environment import data_directory
from eggroll._optional import require
from eggroll.errors import DataError
from eggroll.llm.tasks.answers import FORMAT_WEIGHT, column, text_of
from eggroll.llm.tasks.arithmetic import evaluate
from eggroll.llm.tasks.splits import Row, Splits, fill, normal

__all__ = [
    "BEST", "DESCRIPTION", "MAX_TOKENS", "SETTINGS", "SHOTS_MAX_TOKENS", "SHOTS_SYSTEM", "SYSTEM",
    "extract", "is_correct", "is_plain", "reward", "splits", "worked",
]  # fmt: skip

DESCRIPTION = "Solve a grade-school word problem; the answer is a number."
MAX_TOKENS = 256
BEST = 1.0 + FORMAT_WEIGHT
SYSTEM: str | None = None
SETTINGS: dict[str, Any] = {}
SHOTS_SYSTEM: str | None = None
SHOTS_MAX_TOKENS = MAX_TOKENS

HUB = "openai/gsm8k:main"
SHARES = {"train": 0.9, "validation": 0.05, "heldout": 0.05}
SIZES = {"train": 10_000, "validation": 64, "heldout": 64}
MAX_CHARACTERS = 80
MAX_DEPTH = 2
CLOSE = Fraction(1, 2_000_000)
"""Answers are compared to six decimals, as math-verify does."""
MAX_DIVISIONS = 5
"""In what math-verify gets: its time doubles with each of a chain of them, and these take it under half a second."""
_PROMPT = "{question}\nThink step by step, and end with the answer as a number in \\boxed{{}}."
_EXAMPLE = '{"prompt": "...", "answer": "72"}'
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?\d[\d,]*(?:\.\d+)?", re.ASCII)
_COMMANDS = re.compile(r"\\(?:dfrac|tfrac|frac|cdot|times|div|left|right)(?![A-Za-z])")
_DIVISION = re.compile(r"/|\\(?:dfrac|tfrac|frac|div)(?![A-Za-z])")
_NOISE = re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}|\\[,;:! ]|\\?[$%€£]|\{,\}")
_PLAIN = re.compile(r"[\d+\-*/().{} ]*\d[\d+\-*/().{} ]*", re.ASCII)
_AROUND = re.compile(r"^[A-Za-z][A-Za-z ]*=|(?<=[\d)}])\s*[A-Za-z][A-Za-z ./]*$")


def check(columns: Mapping[str, Any]) -> None:
    """Find out that a row of a data set cannot be scored, before anything is scored.

    Raises:
        DataError: it has no gold answer.
    """
    if columns.get("answer") is None:
        raise DataError(f'the task "gsm8k" needs a column "answer", as in {_EXAMPLE}; there are {sorted(columns)}')


def splits() -> Splits:
    """The task's problems: rows of ``prompt``, ``answer`` (the gold number as a string) and ``solution``, in words.

    Raises:
        MissingExtraError: math-verify is not installed.
        DataError: the data set is neither here nor on the hub.
    """
    require("math_verify", extra="tasks")
    test = dict(_problems("test"))
    train = ((key, row) for key, row in _problems("train") if key not in test)
    return {**fill(train, SIZES, SHARES), "test": list(test.values())}


def worked(row: dict[str, Any]) -> tuple[str, str]:
    """A problem, and a full answer to it."""
    return row["prompt"], row["solution"]


def extract(text: str) -> str | None:
    """The answer in a completion, as it is written; ``None`` if there is nothing like one."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    _, marker, after = text.rpartition("####")
    if marker and after.strip():
        return after.strip().splitlines()[0]
    # the last number is near the end; the rest of a long text is not searched
    numbers = _NUMBER.findall(text[-4096:])
    return numbers[-1] if numbers else None


def is_plain(answer: str) -> bool:
    """Whether an answer is a number that :func:`is_correct` computes exactly."""
    made = _cleaned(answer)
    return made is not None and _value(made) is not None


@lru_cache(maxsize=65536)
def is_correct(answer: str, gold: str) -> bool:
    """Whether an extracted answer equals the gold number; ``False`` if it cannot be read.

    Numbers, fractions and the four operations are computed exactly; math-verify decides about whatever else is harmless
    (mixed numbers, unusual notation). It gets so little to do that it has no time limit: no score depends on a clock.
    """
    made, wanted = _cleaned(answer), _cleaned(gold)
    if made is None or wanted is None:
        return False
    exact = _value(made), _value(wanted)
    if exact[0] is not None and exact[1] is not None:
        return abs(exact[0] - exact[1]) < CLOSE
    if any(_depth(text) > MAX_DEPTH or len(_DIVISION.findall(text)) > MAX_DIVISIONS for text in (made, wanted)):
        return False  # math-verify's time grows with every level and doubles with every division
    math_verify = require("math_verify", extra="tasks")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time limit; none is needed
    try:
        right, found = (math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (wanted, made))
        return bool(math_verify.verify(right, found, timeout_seconds=None))
    except Exception:  # whatever a model writes is wrong at worst
        return False


def reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any] | None = None, **_: Any
) -> list[float]:
    """The scores of ``completions``, in TRL's form; an ``answer`` may be the data set's own, ending in ``#### 72``.

    Raises:
        RewardError: the data set has no column ``answer``.
    """
    golds = column("gsm8k", answer, "answer", _EXAMPLE)
    return [_score(text_of(text), _gold_number(str(gold))) for text, gold in zip(completions, golds, strict=True)]


def _score(text: str, gold: str) -> float:
    answer = extract(text)
    form = text.count("\\boxed{") == 1 and bool((_boxed(text) or "").strip())
    right = answer is not None and is_correct(answer, gold)
    return (FORMAT_WEIGHT if form else 0.0) + (1.0 if right else 0.0)


def _boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, with balanced braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for index in range(start, min(len(text), start + 4 * MAX_CHARACTERS)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return None


def _cleaned(answer: str) -> str | None:
    """An answer without units and separators; ``None`` unless it is harmless arithmetic."""
    if len(answer) > 4 * MAX_CHARACTERS:
        return None
    text = _NOISE.sub("", answer)
    text = re.sub(r"(?<=\d),(?=\d)", "", text).strip().rstrip(".,").strip()
    text = _AROUND.sub("", text).strip()
    short = len(text) <= MAX_CHARACTERS and "**" not in text and "//" not in text
    return text if short and _PLAIN.fullmatch(_COMMANDS.sub("", text)) else None


def _value(text: str) -> Fraction | None:
    """Cleaned arithmetic, exactly; ``None`` where its notation is not that of ``+ - * / ( )`` and fractions."""
    if re.search(r"\d\s*\\[dt]?frac|\d\s+\d", text):  # mixed numbers
        return None
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text, count = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text), 1
    while count:
        text, count = re.subn(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\(?:cdot|times)(?![A-Za-z])", "*", re.sub(r"\\div(?![A-Za-z])", "/", text))
    text = text.translate(str.maketrans("{}", "()"))
    text = re.sub(r"\d*\.\d+|\d+\.", lambda found: f"({Fraction(found[0])})", text)
    text = re.sub(r"(?<=[\d)])\s*(?=\()|(?<=\))\s*(?=\d)", "*", re.sub(r"(?<!\d)0+(?=\d)", "", text))
    found = evaluate(text)
    return None if found is None else found[0]


def _depth(text: str) -> int:
    """How deep brackets are nested."""
    deepest = now = 0
    for char in text:
        now += {"(": 1, "{": 1, ")": -1, "}": -1}.get(char, 0)
        deepest = max(deepest, now)
    return deepest


def _gold_number(answer: str) -> str:
    return answer.rpartition("####")[2].strip().replace(",", "")


def _problems(split: str) -> Iterator[tuple[str, Row]]:
    from eggroll.llm.data.examples import load_examples

    try:
        examples = load_examples(_source(split), split=split)
    except DataError as error:
        reason = str(error).partition(". A configuration")[0]  # the rest is how to name another data set
        raise DataError(
            f"the task gsm8k needs its data set: {reason}. Set EGGROLL_DATA_DIR to a folder that holds "
            "gsm8k/train.jsonl.gz and gsm8k/test.jsonl.gz (from github.com/openai/grade-school-math), or let it be "
            "loaded once from the hub (openai/gsm8k)"
        ) from error
    for example in examples:
        question = str(example.prompt).strip()
        gold = str(example.columns["answer"])
        number = _gold_number(gold)
        words = _CALCULATOR.sub("", gold.rpartition("####")[0]).strip()
        row = {
            "prompt": _PROMPT.format(question=question),
            "answer": number,
            "solution": f"{words}\nThe answer is \\boxed{{{number}}}.",
        }
        yield normal(question), row


def _source(split: str) -> str | Path:
    folder = data_directory()
    names = (f"{split}.jsonl.gz", f"{split}.jsonl")
    paths = [] if folder is None else [folder / "gsm8k" / name for name in names]
    return next((path for path in paths if path.exists()), HUB)
