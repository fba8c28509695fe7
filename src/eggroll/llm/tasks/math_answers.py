r"""Whether two answers to a mathematical problem are the same, as math-verify decides, within limits.

    same text, apart from spaces, signs of money, ``\left`` and the like    right
    two numbers (whole, decimals, fractions, + - * /)                       compared exactly, to six decimals
    everything else that is harmless: sets, intervals, matrices, terms      math-verify
    the rest                                                                wrong

math-verify computes with sympy, and what a model writes could keep it busy for ever (``9^{9^{9}}``, ``1000000!``) or
fill the memory. So powers have small exponents (those of sums very small ones) and do not stand on each other, numbers
and terms are short, brackets are few levels deep, and sums, products, integrals and limits are not computed. What takes
longer than ``SECONDS`` anyway is wrong, where a signal can interrupt it (the main thread).
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from eggroll._optional import require
from eggroll.llm.tasks import gsm8k
from eggroll.llm.tasks.screening import time_limit

__all__ = ["SECONDS", "is_harmless", "same"]

SECONDS = 5.0
MAX_CHARACTERS = 256
MAX_DIGITS = 40
MAX_DEPTH = 5
MAX_DIVISIONS = 5
MAX_POWERS = 12
MAX_POWER_OF_A_SUM = 12
_NO_SIGNS = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\{,\}|~|\$")
_SPACES = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_E_NOTATION = re.compile(r"(?<![A-Za-z\\\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![A-Za-z\d.])")
_ENDLESS = re.compile(
    r"\\(?:sum|prod|int|oint|iint|lim|infsum|binom|dbinom|tbinom|Gamma|zeta|pmod|bmod|mod)(?![A-Za-z])"
)
_POWER = re.compile(r"\^\s*(\{[^{}]*\}|\\[A-Za-z]+|.)|\*\*\s*(\S+)")
_SMALL = re.compile(
    r"\{?\s*[-+]?(?:\d{1,3}|[A-Za-z]|\d?[A-Za-z][-+]\d|\\(?:circ|prime|pi|top)|\d{1,2}/\d{1,2}|\\[dt]?frac)\s*\}?"
)
_FACTORIAL = re.compile(r"(?:\d{3,}|[)}\]])\s*!|!\s*!")
_DIVISION = re.compile(r"/|\\(?:dfrac|tfrac|frac|div)(?![A-Za-z])")


@lru_cache(maxsize=65536)
def same(answer: str, gold: str) -> bool:
    """Whether ``answer`` is the same as ``gold``; ``False`` if it cannot be told."""
    made, wanted = _prepared(answer), _prepared(gold)
    if not made or len(made) > 4 * MAX_CHARACTERS:
        return False
    if _bare(made) == _bare(wanted):
        return True
    if gsm8k.is_plain(made) and gsm8k.is_plain(wanted):
        return gsm8k.is_correct(made, wanted)
    if not (is_harmless(made) and is_harmless(wanted)):
        return False
    math_verify = require("math_verify", extra="tasks")
    for name in ("math_verify", "latex2sympy2_extended"):  # they warn that there is no time limit; here is one
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with time_limit(SECONDS):
            right, found = (math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (wanted, made))
            return bool(math_verify.verify(right, found, timeout_seconds=None))
    except Exception:  # whatever a model writes is wrong at worst
        return False


def is_harmless(text: str) -> bool:
    """Whether math-verify may see an answer; see above."""
    deepest = depth = 0
    for char in text:
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(char, 0)
        deepest = max(deepest, depth)
    return (
        len(text) <= MAX_CHARACTERS
        and deepest <= MAX_DEPTH
        and not re.search(rf"\d{{{MAX_DIGITS + 1}}}", text)
        and not _ENDLESS.search(text)
        and not _FACTORIAL.search(text)
        and len(_DIVISION.findall(text)) <= MAX_DIVISIONS
        and _has_small_powers(text)
    )


def _has_small_powers(text: str) -> bool:
    """Exponents of up to three digits or a name, none of a power, and not many: ``9^{9^9}`` has no end."""
    found = list(_POWER.finditer(text))
    if len(found) > MAX_POWERS or text.count("^") + text.count("**") != len(found):
        return False
    exponents = [(match[1] or match[2]).strip() for match in found]
    if not all(_SMALL.fullmatch(exponent) for exponent in exponents):
        return False
    if any(re.match(r"\s*(?:\^|\*\*)", text[match.end() :]) for match in found):
        return False
    of_sums = [
        e for e, match in zip(exponents, found, strict=True) if text[: match.start()].rstrip().endswith((")", "}"))
    ]
    if any(int(digits) > MAX_POWER_OF_A_SUM for exponent in of_sums for digits in re.findall(r"\d+", exponent)):
        return False
    # what is raised to a power and then raised again, as in (9^{99})^{99}
    inner = re.sub(r"[^(){}^*]", "", text)
    return not re.search(r"\([^()]*(?:\^|\*\*)[^()]*\)\}*(?:\^|\*\*)", inner)


def _prepared(text: str) -> str:
    """An answer as math-verify reads it: without ``$`` around it, and ``1e5`` as a power of ten."""
    text = text.strip().strip("$").strip().rstrip(".").strip()
    return _E_NOTATION.sub(r"\1 \\times 10^{\2}", text)


def _bare(text: str) -> str:
    return re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", _SPACES.sub("", _NO_SIGNS.sub("", text)))
