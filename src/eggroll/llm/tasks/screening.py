"""Answers that may be handed to a scorer of reasoning-gym, and answers that may not.

Some of its scorers give what a model wrote to Python's ``eval`` or to ``sympy.parse_expr``, which is ``eval`` too. A
model that is evolved against such a scorer would be free to run code, and one that writes ``9**9**9`` would stop the
run. So an answer is looked at first, as a syntax tree, and refused (score 0) unless it can do no harm:

    LITERALS     (scorers that eval lists)       a Python literal, or no Python expression at all
    ARITHMETIC   (scorers that compute)          digits, + - * / ( ) and full stops
    SYMBOLIC     (scorers that compare terms)    numbers, one-letter names, + - * / **, elementary functions; small
                                                 exponents, and not many names and functions to a high degree: the
                                                 time grows with the number of terms when all is multiplied out
    DISTANCES    (scorers of how near it is)     no "nan", which one of them takes for exactly right
    all          no numbers with exponents of four digits (1e9999999 as a fraction fills the memory), no answer that is
                 many times as long as any right one

A scorer that takes longer than ``SECONDS`` anyway is interrupted where signals can do that (the main thread).
"""

from __future__ import annotations

import ast
import math
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ARITHMETIC", "DISTANCES", "LITERALS", "SECONDS", "SYMBOLIC", "is_harmless", "time_limit"]

LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
ARITHMETIC = frozenset({"countdown", "puzzle24"})
SYMBOLIC = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
DISTANCES = frozenset({"complex_arithmetic"})
SECONDS = 5.0

MAX_EXPRESSION = 300
MAX_DIGITS = 30
MAX_EXPONENT = 16
MAX_EXPANSION = 64
"""Degree times the names and function calls in a term. Right answers of 240 problems have at most 20."""
MAX_CALLS = 8
"""Right answers have at most 4 calls."""
MAX_CALL_DEPTH = 2
_NAMES = "sin cos tan cot sec csc asin acos atan sinh cosh tanh asinh acosh atanh exp log ln sqrt Abs"
FUNCTIONS = frozenset(_NAMES.split())
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_EXPONENT = re.compile(r"[\d.]_?[eE][+-]?(?:\d_?){4}")
_ARITHMETIC = frozenset("0123456789+-*/(). \t\n")


def is_harmless(task: str, answer: str, right: str) -> bool:
    """Whether the scorer of ``task`` may see ``answer``.

    Args:
        task: the name in reasoning-gym.
        answer: what the model answered.
        right: the problem's own answer, which is always harmless; empty if it has none.
    """
    if answer.strip() == right.strip():
        return True
    if len(answer) > 2000 + 4 * len(right) or _EXPONENT.search(answer):
        return False
    if task in LITERALS:
        return _is_literal(answer.strip())
    if task in ARITHMETIC:
        return len(answer) <= MAX_EXPRESSION and _ARITHMETIC.issuperset(answer) and "**" not in answer
    if task in SYMBOLIC:
        return _is_symbolic(answer.strip())
    return not (task in DISTANCES and "nan" in answer.lower())


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` in the block after so many seconds; no limit outside of the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"over {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, should code in the block have swallowed it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_literal(answer: str) -> bool:
    try:
        ast.literal_eval(answer)
    except SyntaxError:
        return "\0" not in answer  # eval refuses it for the same reason, before it runs anything
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_symbolic(answer: str) -> bool:
    if len(answer) > MAX_EXPRESSION or not answer.isascii():
        return False
    try:
        term = ast.parse(answer, mode="eval").body
        nodes = list(ast.walk(term))
        calls = {ast.dump(node) for node in nodes if isinstance(node, ast.Call)}
        names = {node.id for node in nodes if isinstance(node, ast.Name)} - FUNCTIONS
        return len(calls) <= MAX_CALLS and _degree(term, 0) * max(1, len(calls | names)) <= MAX_EXPANSION
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _degree(node: ast.expr, calls: int) -> int:
    """A bound on the degree of a term, 1 for numbers and names; ``ValueError`` for what is not allowed."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        if len(str(node.value)) > MAX_DIGITS:
            raise ValueError("too many digits")
        return 1
    if isinstance(node, ast.Name) and (len(node.id) == 1 or node.id == "pi"):
        return 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return _degree(node.operand, calls)
    if isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
        both = _degree(node.left, calls), _degree(node.right, calls)
        is_scaled = any(isinstance(side, ast.Constant) for side in (node.left, node.right))
        is_sum = isinstance(node.op, ast.Add | ast.Sub)
        return max(both) if is_sum or is_scaled else sum(both)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _degree(node.left, calls) * _exponent(node.right)
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords and calls < MAX_CALL_DEPTH:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise ValueError("a function that is not known")
        return _degree(node.args[0], calls + 1)
    raise ValueError(f"{type(node).__name__} is not allowed here")


def _exponent(node: ast.expr) -> int:
    """The size of an exponent: a number or a quotient of numbers, with a sign."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return _exponent(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return max(_exponent(node.left), _exponent(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and 0 <= node.value <= MAX_EXPONENT:
        return max(1, math.ceil(node.value))
    raise ValueError("an exponent must be a small number")
