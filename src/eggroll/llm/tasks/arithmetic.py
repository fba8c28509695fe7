"""Arithmetic that a model wrote, read as a syntax tree and computed with exact fractions. Nothing is ever run.

    expression = number | (expression) | + expression | - expression | expression (+ | - | * | /) expression

Numbers are whole and in ASCII digits. Everything else is refused: powers (``9**9**9`` would fill the memory), ``//``,
names, calls, decimal points, other scripts' digits. What is accepted is short, so it is cheap to compute.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from fractions import Fraction

__all__ = ["MAX_CHARACTERS", "evaluate", "steps"]

MAX_CHARACTERS = 256
"""Longer expressions are refused unread: four numbers need thirty."""
_ALLOWED = frozenset("0123456789+-*/() \t\r\n")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / right,
}

_SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression and the numbers in it, from left to right.

    Returns:
        ``None`` if the text is not such an expression, divides by zero, or is longer than ``MAX_CHARACTERS``.
    """
    text = text.strip() if len(text) <= 2 * MAX_CHARACTERS else ""
    if not text or len(text) > MAX_CHARACTERS or not _ALLOWED.issuperset(text):
        return None
    numbers: list[int] = []
    try:
        return _value(ast.parse(text, mode="eval").body, numbers), numbers
    # MemoryError and RecursionError are how Python's parser refuses brackets that are nested too deeply
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, numbers)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left = _value(node.left, numbers)
        return _OPERATIONS[type(node.op)](left, _value(node.right, numbers))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def steps(text: str) -> list[str]:
    """An expression's operations with their values, in the order of computing: ``["6 * 7 = 42", "42 - 2 = 40"]``.

    Raises:
        SyntaxError, ValueError, ZeroDivisionError: the text is not such an expression. It is not meant for what a
            model wrote.
    """
    found: list[str] = []
    _write_steps(ast.parse(text, mode="eval").body, found)
    return found


def _write_steps(node: ast.expr, found: list[str]) -> Fraction:
    if not isinstance(node, ast.BinOp):
        return _value(node, [])
    left, right = _write_steps(node.left, found), _write_steps(node.right, found)
    value = _OPERATIONS[type(node.op)](left, right)
    found.append(f"{left} {_SIGNS[type(node.op)]} {right} = {value}")
    return value
