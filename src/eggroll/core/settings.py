"""How a setting is declared: once, with its default, its other names, and whether a resumed run may change it.

A configuration is a dataclass; command lines are built of configurations by inheritance. The docstring below a field is
its text, in Python and in ``--help``::

    population_size: int = setting(256, flags=("-p", "--population"))
    \"\"\"Members per generation; both signs of an antithetic pair count.\"\"\"
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eggroll.core.reading import shown
from eggroll.errors import ConfigError, RunError

OnResume = bool | Callable[[Any], bool]
"""Whether a resumed run may have another value: yes, no, or asked of the options."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    flags: Sequence[str] = (),
    resume: OnResume = False,
    positional: str = "",
    hidden: bool = False,
    runs_code: Callable[[Any], bool] | None = None,
    always_ask: bool = False,
    absent: Any = None,
) -> Any:
    """A dataclass field with what a command line and a resumed run need to know about it.

    Args:
        default: the field's default; without one the field is required.
        flags: further names on the command line, such as ``-p``. A long one is also a name that old runs may have
            stored the setting under.
        resume: whether the value may change when a run is resumed, because it changes no result.
        positional: given without a flag; this is the word for it in the usage line.
        hidden: not on the command line.
        runs_code: tells of a value whether it runs code that is not eggroll's. A value that does is not taken from a
            run's directory (:mod:`eggroll.lifecycle.trust`).
        always_ask: such a value has to be given again to every command, also to a replay, which needs it.
        absent: what runs had that were stored before there was this setting, if that is not the default.
    """
    metadata = {
        "flags": tuple(flags), "resume": resume, "positional": positional, "hidden": hidden, "runs_code": runs_code,
        "always_ask": always_ask, "absent": absent,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def about(kind: type[Any], name: str) -> Mapping[str, Any]:
    """What :func:`setting` was told about a field. A subclass that only gives another default need not repeat it."""
    for base in kind.__mro__:
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata:
            return field.metadata
    return {}


def may_change(options: Any) -> set[str]:
    """Names of the fields of ``options`` that a resumed run may change."""
    found = set()
    for field in dataclasses.fields(options):
        rule = about(type(options), field.name).get("resume", False)
        if rule(options) if callable(rule) else rule:
            found.add(field.name)
    return found


def to_json_values(options: Any, kind: type[Any] | None = None) -> dict[str, Any]:
    """Fields of ``options`` as JSON values: tuples become lists.

    Args:
        options: a dataclass instance.
        kind: only the fields of this base class of it; ``None`` takes all.
    """
    names = (field.name for field in dataclasses.fields(kind or options))
    values = ((name, getattr(options, name)) for name in names)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


def narrowed(options: Any, kind: type[Any]) -> Any:
    """``options`` as an instance of one of their bases: the part of them that ``kind`` knows."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def from_json_values(kind: type[Any], stored: Mapping[str, Any], *, ignored: Sequence[str] = (), source: str) -> Any:
    """The options that :func:`to_json_values` stored, under today's names.

    Args:
        kind: the dataclass.
        stored: its values; names that old runs used (``flags``) are understood.
        ignored: names that are no settings (any more).
        source: where the values come from, for the message.

    Raises:
        RunError: settings that this version does not know.
        ConfigError: values that cannot work.
    """
    names: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        for name in (field.name, *(flag.removeprefix("--") for flag in about(kind, field.name).get("flags", ()))):
            names.setdefault(name.replace("-", "_"), field.name)
    unknown = sorted(name for name in stored if name not in names and name not in ignored)
    if unknown:
        raise RunError(f"{source} has settings that this version does not know: {', '.join(unknown)}")
    older = ((field.name, about(kind, field.name).get("absent")) for field in dataclasses.fields(kind))
    values = {name: value for name, value in older if value is not None}
    values |= {names[name]: value for name, value in stored.items() if name in names}
    wrong = wrong_types(kind, values)
    if wrong:
        raise ConfigError.from_problems(f"{source} cannot be read as settings", wrong)
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{source} cannot be read as settings: {error}") from None


def wrong_types(kind: type[Any], values: Mapping[str, Any]) -> list[str]:
    """A sentence for each value of JSON that is not of its field's type."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # a type that is there for type checkers only
        return []
    wrong = [name for name, value in values.items() if not _fits(value, hints[name])]
    return [f"{name} (={shown(values[name])}) must be {_words(hints[name])}" for name in wrong]


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = [part for part in parts if typing.get_origin(part) is typing.Literal and {int, float} & set(parts)]
        if isinstance(value, str) and words:  # a number or one of a few words
            return any(value in typing.get_args(part) for part in words)
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return type(value) in {type(part) for part in parts}  # which one of them is for the settings to say
    if origin is tuple:
        part = parts[0] if parts else Any
        return isinstance(value, list | tuple) and all(_fits(item, part) for item in value)
    if hint in (None, types.NoneType):
        return value is None
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool) else not _is_callable(hint)


def _is_callable(hint: Any) -> bool:
    """Whether a type is that of functions, which JSON does not have."""
    return typing.get_origin(hint) is Callable


def _words(hint: Any) -> str:
    """A type in words: ``a whole number or null``."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts if not _is_callable(part)))
    if origin is typing.Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return "a list"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}.get(
        hint, str(hint)
    )


def flag_of(name: str) -> str:
    """The command line's name of a field: ``batch_size`` is ``--batch-size``."""
    return f"--{name.replace('_', '-')}"
