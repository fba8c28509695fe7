"""What stands behind a flag is looked at before the parser does, whose complaints speak of Python's types."""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from eggroll.cli.helping import Option

NUMBERS: Mapping[type, str] = {int: "a whole number", float: "a number"}
YES_OR_NO = {"yes": "True", "true": "True", "no": "False", "false": "False"}
"""What a setting that is yes, no or neither is typed as, and what the parser calls it."""
AS_TEXT: Mapping[Any, tuple[str, ...]] = {types.NoneType: ("None",), bool: ("True", "False")}
"""What the parser calls the values of these types."""
FROM_TRANSFORMERS = {"--load-in-4bit": ("--quantize", "int4"), "--load-in-8bit": ("--quantize", "int8")}
"""Flags that users of transformers and TRL know."""


def in_our_words(names: Collection[str], arguments: Sequence[str]) -> list[str]:
    """The command line with our flags in the place of transformers', for a command that has these settings."""
    if "quantize" not in names:
        return list(arguments)
    return [word for given in arguments for word in FROM_TRANSFORMERS.get(given.replace("_", "-"), (given,))]


def read_values(
    told: Sequence[Option], hints: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The arguments as the parser takes them, and what is wrong with them.

    Args:
        told: the options that there are.
        hints: their types, by name.
        arguments: the command line.

    Returns:
        The arguments, with ``yes`` and ``no`` in the parser's words; a sentence for each value that is none of those
        which its option takes.
    """
    by_flag = {flag: option for option in told if not option.positional for flag in option.flags}
    written: list[str] = []
    problems: list[str] = []
    index = 0
    while index < len(arguments):
        flag, value, attached = _split(arguments[index], by_flag)
        option, index = by_flag.get(_known(flag)), index + 1
        if option is None or (hint := hints.get(option.name)) in (None, bool):
            written.append(arguments[index - 1])
            if flag == "--":
                return written + list(arguments[index:]), problems
            continue
        kinds, count = _kinds(hint)
        values = [value] if attached else []
        while len(values) < count and index < len(arguments) and not _is_flag(arguments[index], by_flag):
            values.append(arguments[index])
            index += 1
        if bool in kinds:
            values = [YES_OR_NO.get(one.lower(), one) for one in values]
        allowed = _allowed(kinds)
        if allowed and len(values) < count:
            needed = allowed if count == 1 else f"{count} numbers"
            problems.append(f"{flag} needs {needed} after it")
        elif allowed:
            wrong = [one for one in values if not _fits(one, kinds)]
            many = f"{count} numbers, such as 0.9 0.99" if count > 1 else allowed
            problems += [f"{flag} takes {many}, not {_shown(one)!r}{_near(one, kinds)}" for one in wrong]
        written += [f"{flag}={values[0]}", *values[1:]] if attached else [flag, *values]
    return written, problems


def _known(flag: str) -> str:
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _split(word: str, by_flag: Mapping[str, Option]) -> tuple[str, str, bool]:
    """Flag, value and whether one was attached: ``--rank=2``, ``-p=8`` or ``-p8``."""
    flag, equals, value = word.partition("=")
    if equals or word.startswith("--"):
        return flag, value, bool(equals)
    if len(word) > 2 and word[:2] in by_flag:
        return word[:2], word[2:], True
    return word, "", False


def _is_flag(word: str, by_flag: Mapping[str, Option]) -> bool:
    return word.startswith("--") or _split(word, by_flag)[0] in by_flag


def _kinds(hint: Any) -> tuple[list[Any], int]:
    """Types and words that a value may have, and how many values there are; 1 for lists, which may be of any text."""
    if get_origin(hint) is tuple and Ellipsis not in get_args(hint):
        return [get_args(hint)[0]], len(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)[0]], 1
    return (list(get_args(hint)) if get_origin(hint) is Literal else [hint]), 1


def _allowed(kinds: Sequence[Any]) -> str:
    """In words; empty where any text will do."""
    if any(kind not in (int, float, bool, types.NoneType) and not isinstance(kind, str) for kind in kinds):
        return ""
    words = [NUMBERS[kind] for kind in kinds if kind in NUMBERS]
    words += ["yes", "no"] if bool in kinds else []
    words += [kind for kind in kinds if isinstance(kind, str)]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _fits(value: str, kinds: Sequence[Any]) -> bool:
    for kind in kinds:
        if kind in NUMBERS:
            try:
                kind(value)
            except ValueError:
                continue
            return True
        if value == kind or value in AS_TEXT.get(kind, ()):
            return True
    return False


def _near(value: str, kinds: Sequence[Any]) -> str:
    near = difflib.get_close_matches(value, [kind for kind in kinds if isinstance(kind, str)], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: str, limit: int = 60) -> str:
    return value if len(value) <= limit else f"{value[: limit - 3]}..."
